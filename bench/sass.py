"""What a kernel's machine code says that a compiler's summary does not: the cost of a normal.

Box-Muller takes a MUFU.COS and a MUFU.SIN for two normals, so code draws 2 x MUFU.COS normals. It
is split into basic blocks; the loop is the innermost around a MUFU.COS, in practice the one over
children, or the whole kernel where noise is in no loop. Counted is the cheapest way once around,
from the loop's first block to the jump back, that

- draws one stream of a full tile: the stated number of normals a thread; where none is stated, or
  no way draws that many, the smallest number that one does; and
- holds a 16-byte store, if the loop holds any: the way of a full tile, not of a ragged one.

Instructions on that way / normals on it is the result: all that a child costs besides its noise is
in it. A conditional jump is two edges, whatever the condition, so no way is left out as impossible.
A loop within the way counts once, a call as one instruction, a NOP as none.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from typing import NamedTuple

ENTRY = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^([.$\w]+):")
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(\S+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\(([^)]+)\)")
NO_TARGET = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


class Instruction(NamedTuple):
    """One line; `words` is the opcode, split at its dots."""

    guard: str
    words: tuple[str, ...]
    operands: str

    def jumps(self) -> bool:
        return self.words[0] in ("BRA", "EXIT", "RET")

    def is_conditional(self) -> bool:
        """Whether a jump depends on a predicate: before it, or its first operand."""
        first = self.operands.split(",")[0] if "," in self.operands else ""
        return bool(self.guard) or (self.words[0] == "BRA" and bool(first))

    def is_wide(self, *names: str) -> bool:
        """Whether it is one of the named accesses, to 16 bytes at least."""
        return self.words[0] in names and not {"128", "256"}.isdisjoint(self.words)


class Block(NamedTuple):
    """Instructions that run one after the other; only the last may jump."""

    instructions: list[Instruction]
    successors: list[int]

    @property
    def cost(self) -> int:
        return sum(line.words[0] != "NOP" for line in self.instructions)

    @property
    def normals(self) -> int:
        return 2 * sum(line.words[:2] == ("MUFU", "COS") for line in self.instructions)

    @property
    def stores(self) -> bool:
        return any(line.is_wide("STG") for line in self.instructions)


class Loop(NamedTuple):
    """Blocks that go round: `tails` jump back to `head`, or end a kernel that is no loop."""

    head: int
    tails: frozenset[int]
    body: frozenset[int]


def functions(text: str) -> dict[str, list[str]]:
    """Splits what `nvdisasm -c` prints into the lines of each kernel, by mangled name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if entry := ENTRY.match(line):
            lines = found[entry[1]] = []
        elif line.lstrip().startswith(".section"):
            lines = []
        else:
            lines.append(line)
    return found


def blocks(lines: Iterable[str]) -> list[Block]:
    """Splits a kernel into basic blocks; the first is where it starts."""
    runs: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    for line in lines:
        if found := LINE.search(line):
            guard, opcode, operands = found.groups()
            instruction = Instruction(guard or "", tuple(opcode.split(".")), operands)
            if instruction.words[0] in NO_TARGET:
                raise ValueError(f"sass: a jump must name its target, got {line.strip()!r}")
            runs[-1].append(instruction)
            if instruction.jumps():
                runs.append([])
        elif label := LABEL.match(line):
            if runs[-1]:
                runs.append([])
            at[label[1]] = len(runs) - 1
    return [Block(run, _successors(i, run, at, len(runs))) for i, run in enumerate(runs)]


def _successors(index: int, run: list[Instruction], at: dict[str, int], count: int) -> list[int]:
    following = [index + 1] if index + 1 < count else []
    if not run or not run[-1].jumps():
        return following
    found = following if run[-1].is_conditional() else []
    if run[-1].words[0] != "BRA":
        return found
    return [*found, at[TARGET.findall(run[-1].operands)[-1]]]


def instructions_per_normal(graph: list[Block], lane_normals: int | None = None) -> float | None:
    """Counts what a normal costs, as the head of this file defines; None if the kernel draws none.

    Args:
        graph: the blocks of a kernel.
        lane_normals: normals of one stream that a thread draws for a full tile, if known.

    Raises:
        ValueError: no way does what is asked, as where noise is in a function that is called.
    """
    if not any(block.normals for block in graph):
        return None
    found = loops(graph)
    whole = found[-1].body
    chosen = {next(x for x in found if n in x.body) for n in whole if graph[n].normals}
    costs = [_once_around(graph, loop, found, lane_normals) for loop in chosen]
    ratios = [cost for cost in costs if cost is not None]
    if not ratios:
        raise ValueError("sass: a way must draw noise and store 16 bytes if any does, got none")
    return round(min(ratios), 2)


def loops(graph: list[Block]) -> list[Loop]:
    """Finds the natural loops, one per head, the innermost first; the last is the whole kernel."""
    reachable = _reachable(graph)
    found: list[Loop] = []
    for head in {after for node in reachable for after in graph[node].successors}:
        # a jump back comes from a block that is reached through its target only
        through = reachable - _reachable(graph, without=head)
        if tails := frozenset(node for node in through if head in graph[node].successors):
            found.append(Loop(head, tails, _body(graph, reachable, head, tails)))
    ends = (n for n in reachable for line in graph[n].instructions if line.words[0] == "EXIT")
    found.sort(key=lambda loop: len(loop.body))
    return [*found, Loop(0, frozenset(ends), frozenset(reachable))]


def _reachable(graph: list[Block], without: int | None = None) -> set[int]:
    seen: set[int] = set()
    todo = [0] if without != 0 else []
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [after for after in graph[node].successors if after != without]
    return seen


def _body(
    graph: list[Block], reachable: set[int], head: int, tails: frozenset[int]
) -> frozenset[int]:
    before: dict[int, list[int]] = {node: [] for node in reachable}
    for node in reachable:
        for after in graph[node].successors:
            before[after].append(node)
    body, todo = {head}, list(tails)
    while todo:
        node = todo.pop()
        if node not in body:
            body.add(node)
            todo += before[node]
    return frozenset(body)


def _once_around(
    graph: list[Block], loop: Loop, found: list[Loop], lane_normals: int | None
) -> float | None:
    """Searches the ways from head to tail by cost (Dijkstra), for every number of normals."""
    back = {(tail, each.head) for each in found[:-1] for tail in each.tails}
    most = sum(graph[node].normals for node in loop.body)
    must_store = any(graph[node].stores for node in loop.body)
    best: dict[int, int] = {}
    seen: set[tuple[int, int, bool]] = set()
    heap = [(0, loop.head, 0, not must_store)]
    while heap:
        cost, node, normals, stored = heapq.heappop(heap)
        block = graph[node]
        cost, normals, stored = (
            cost + block.cost,
            normals + block.normals,
            stored or block.stores,
        )
        if normals > most or (node, normals, stored) in seen:
            continue
        seen.add((node, normals, stored))
        if node in loop.tails and stored and normals:
            best.setdefault(normals, cost)
        for after in block.successors:
            if after in loop.body and (node, after) not in back:
                heapq.heappush(heap, (cost, after, normals, stored))
    if not best:
        return None
    drawn = lane_normals if lane_normals in best else min(best)
    return best[drawn] / drawn
