"""Studies that answer a question about the algorithms, each a command that writes its numbers."""
