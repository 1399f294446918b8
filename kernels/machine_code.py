"""Registers, spills and widths of accesses to rows of a compiled kernel.

A row is what a kernel loads or stores as a block (a tensor in Triton's intermediate code); single
numbers such as a label are narrow by nature, and a block with less than 16 bytes for each
thread, as of a few channels, cannot be accessed that wide. The kinds are distinguished by the line
of source of an access, which is the same in the intermediate code and in the PTX.
"""

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

WIDE = 16  # bytes, the most that one instruction moves on sm_80 to sm_100

_NAMED_PLACE = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.M)
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')
_BLOCK_ACCESS = re.compile(
    r"tt\.(?:load|store) .*: tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>.*loc\((#loc\d*)\)"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.M)
_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_ACCESS = re.compile(r"\b(ld|st)(?:\.[a-z_]+)*\.global([\w.:]*)")
_VECTOR = re.compile(r"\.v(\d)\b")
_ELEMENT = re.compile(r"\.[busf](8|16|32|64|128)\b")
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")

Line = tuple[str, str]  # name of a source file, number of a line


class Code(NamedTuple):
    """Resources of a compiled kernel."""

    registers: int  # of each thread
    stack: int  # bytes of each thread; more than 0 is a spill
    local: int  # bytes of local memory of each thread besides the stack
    shared: int  # bytes of shared memory of each block
    loads: dict[int, int]  # bytes that one instruction reads of a row: how many such instructions
    stores: dict[int, int]
    narrow: tuple[
        str, ...
    ]  # of loads and stores, those with less than a thread's share, up to WIDE


def read(kernel: Any) -> Code:
    """Resources of a kernel that Triton compiled; nothing is run."""
    resources = _resources(kernel.asm["cubin"])
    blocks = _lines_of_blocks(kernel.asm["ttgir"], 32 * kernel.metadata.num_warps)
    shared = int(kernel.metadata.shared)
    loads, stores, narrow = _widths(kernel.asm["ptx"], blocks)
    registers, stack, local = (resources[name] for name in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack, local, shared, loads, stores, narrow)


def _resources(binary: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in _RESOURCE.findall(text)}


def _lines_of_blocks(ttgir: str, threads: int) -> dict[Line, int]:
    """Lines of the source that load or store a block, with the bytes that an access could have."""
    named = dict(_NAMED_PLACE.findall(ttgir))

    def innermost(name: str) -> Line | None:
        """A place may be a call of a place, or a variable's name for one."""
        text = named[name]
        if found := _PLACE.search(text):
            return Path(found[1]).name, found[2]
        inner = re.search(r"#loc\d+", text)
        return innermost(inner[0]) if inner else None

    lines: dict[Line, int] = {}
    for shape, bits, name in _BLOCK_ACCESS.findall(ttgir):
        size = math.prod(map(int, shape.split("x")[:-1])) * int(bits) // 8
        if line := innermost(name):
            lines[line] = min(lines.get(line, WIDE), size // threads)
    return lines


def _widths(
    ptx: str, blocks: dict[Line, int]
) -> tuple[dict[int, int], dict[int, int], tuple[str, ...]]:
    """Bytes of each instruction that loads or stores on these lines, with their counts, and which
    of both have less than they could."""
    files = {number: Path(name).name for number, name in _FILE.findall(ptx)}
    found: dict[str, dict[int, int]] = {"ld": {}, "st": {}}
    narrow = set()
    line: Line = ("", "")
    # Inside of inline assembly only the first place is right: the compiler counts on from there.
    inside = fixed = False
    for text in ptx.splitlines():
        if "inline asm" in text:
            fixed = False
            inside = "begin" in text
        elif place := _LINE.match(text):
            if not fixed:
                line = files.get(place[1], ""), place[2]
            fixed = inside
        elif line in blocks and (access := _ACCESS.search(text)):
            kind, form = access.groups()
            vector, element = _VECTOR.search(form), _ELEMENT.search(form)
            if element:
                width = int(element[1]) // 8 * (int(vector[1]) if vector else 1)
                found[kind][width] = found[kind].get(width, 0) + 1
                if width < blocks[line]:
                    narrow.add("loads" if kind == "ld" else "stores")
    return found["ld"], found["st"], tuple(sorted(narrow))
