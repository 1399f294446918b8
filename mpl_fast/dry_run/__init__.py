"""What a run would take, told before it begins: rows, operations, memory, time."""
