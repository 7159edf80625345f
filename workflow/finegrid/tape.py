"""What autograd keeps in memory over a piece of a model: a ledger of its operations, without running them.

An operation is noted with its output, the tensors that it saves for backward and which inputs get a gradient. From
these notes the tape tells how many bytes live at each moment of the forward and of the backward pass, by the rules of
torch's engine: an intermediate dies after its last use unless it is saved, a saved one after its operation's backward,
a gradient once it was used, a parameter's gradient never.

Sizes are linear in what a batch brings, so a tape is played once for a model and a way of training and then priced
for any batch: see :class:`Size`. Used by :mod:`finegrid.decoder`; pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add, ge, sub
from typing import NamedTuple


class Size(NamedTuple):
    """Bytes as a linear form of the batch: ``token`` x tokens + ``square`` x rows x length² + ``label`` x label tokens
    + ``last`` x label tokens (in the last layer) + ``chunk`` x label tokens whose logits are made at a time +
    ``fixed``; ``gradient`` are fixed bytes of parameters' gradients, told apart so that they can be partitioned."""

    token: float = 0
    square: float = 0
    label: float = 0
    fixed: float = 0
    gradient: float = 0
    chunk: float = 0
    last: float = 0

    def __add__(self, other: Size) -> Size:
        return Size(*map(add, self, other))

    def __sub__(self, other: Size) -> Size:
        return Size(*map(sub, self, other))

    def __mul__(self, factor: float) -> Size:
        return Size(*[a * factor for a in self])


NOTHING = Size()


class Tensor:
    """A tensor: elements as a linear form, bytes an element, whether it gets a gradient, and whose memory it is."""

    __slots__ = ("base", "elements", "itemsize", "needs_grad", "parameter")

    def __init__(self, elements: Size, itemsize: int, needs_grad: bool, parameter: bool = False, base: Tensor = None):
        self.elements, self.itemsize, self.needs_grad, self.parameter = elements, itemsize, needs_grad, parameter
        self.base = base.base if base is not None else self

    @property
    def bytes(self) -> Size:
        return self.elements * self.itemsize


class Node(NamedTuple):
    """An operation. ``passes``: its backward hands the gradient on as it is; the scratches live while it runs."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    passes: bool
    forward_scratch: Size
    backward_scratch: Size


class Timeline(NamedTuple):
    """Bytes over a piece of a model: what stays saved after forward, and the moments of most memory.

    No moment left out can be the peak for any batch. ``forward`` counts the piece's input, ``backward`` its saved
    tensors, the gradients it makes and the gradient that comes in.
    """

    saved: Size
    forward: tuple[Size, ...]
    backward: tuple[Size, ...]


class Tape:
    """Notes operations (:meth:`op`) and plays them (:meth:`play`)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.held: list[Tensor] = []
        self.kept: list[tuple[int, Tensor]] = []

    def op(
        self,
        inputs: Sequence[Tensor],
        elements: Size,
        itemsize: int,
        saves: Sequence[Tensor] = (),
        *,
        passes: bool = False,
        view: bool = False,
        forward_scratch: Size = NOTHING,
        backward_scratch: Size = NOTHING,
    ) -> Tensor:
        """Note an operation and return its output; a ``view`` is part of its first input's memory."""
        needs_grad = any(tensor.needs_grad for tensor in inputs)
        output = Tensor(elements, itemsize, needs_grad, base=inputs[0] if view else None)
        saved = tuple(saves) if needs_grad else ()
        self.nodes.append(Node(tuple(inputs), (output,), saved, passes, forward_scratch, backward_scratch))
        return output

    def split(self, whole: Tensor, shares: Sequence[float]) -> list[Tensor]:
        """Note views of parts whose gradients wait for each other, as those of ``chunk`` and ``split`` do."""
        parts = [Tensor(whole.elements * share, whole.itemsize, whole.needs_grad, base=whole) for share in shares]
        self.nodes.append(Node((whole,), tuple(parts), (), False, NOTHING, NOTHING))
        return parts

    def saves_output(self) -> None:
        """Let the last operation save its own output too."""
        last = self.nodes[-1]
        if last.outputs[0].needs_grad:
            self.nodes[-1] = last._replace(saved=(*last.saved, last.outputs[0]))

    def keep(self, *tensors: Tensor) -> None:
        """Keep tensors up to the operation noted last: variables of the code around it still name them."""
        self.kept += [(len(self.nodes) - 1, tensor.base) for tensor in tensors]

    def hold(self, tensor: Tensor) -> None:
        """Keep a tensor to the end of the forward pass: a variable of the caller still names it."""
        self.held.append(tensor.base)

    def play(self, source: Tensor, result: Tensor, keep_gradients: bool = False) -> Timeline:
        """Return the bytes over the noted operations, from ``source`` (counted) to ``result``.

        Args:
            keep_gradients: parameters have their gradient already (accumulation): a new one is added to it and dies.
        """
        uses: dict[Tensor, int] = {}
        for node in self.nodes:
            for tensor in {saved.base for saved in node.saved if not saved.base.parameter}:
                uses[tensor] = uses.get(tensor, 0) + 1
        saved = _total(uses)
        return Timeline(
            saved=saved,
            forward=_highest(self._forward(source, result, uses)),
            backward=_highest(self._backward(result, dict(uses), saved, keep_gradients)),
        )

    def _forward(self, source: Tensor, result: Tensor, saved: dict[Tensor, int]) -> Iterable[Size]:
        last: dict[Tensor, int] = {}
        for number, node in enumerate(self.nodes):
            for tensor in (*node.outputs, *node.inputs):
                last[tensor.base] = number
        for number, tensor in self.kept:
            last[tensor] = max(number, last.get(tensor, number))
        for tensor in (source.base, result.base, *self.held):
            last[tensor] = len(self.nodes)
        dying: dict[int, list[Tensor]] = {}
        for tensor, number in last.items():
            if tensor not in saved and not tensor.parameter:
                dying.setdefault(number, []).append(tensor)
        live, seen = source.base.bytes, {source.base}
        for number, node in enumerate(self.nodes):
            # Besides the output, what is made only to be saved: a mask, a logarithm of sums.
            for tensor in (*node.outputs, *node.saved):
                if tensor.base not in seen and not tensor.parameter:
                    seen.add(tensor.base)
                    live += tensor.base.bytes
            yield live + node.forward_scratch
            for tensor in dying.get(number, ()):
                live -= tensor.bytes

    def _backward(self, result: Tensor, saved: dict[Tensor, int], live: Size, keep_gradients: bool) -> Iterable[Size]:
        buffers: dict[Tensor, list] = {result: [result.bytes, 1]}  # a gradient's bytes and how many names it has
        live += result.bytes
        yield live
        for node in reversed(self.nodes):
            arrived = [buffers.pop(tensor) for tensor in node.outputs if tensor in buffers]
            if not arrived:
                continue
            made = []
            for tensor in node.inputs:
                if not tensor.needs_grad:
                    continue
                if node.passes:
                    arrived[0][1] += 1
                    made.append((tensor, arrived[0]))
                else:
                    size = tensor.bytes
                    buffer = [Size(gradient=size.fixed) if tensor.parameter else size, 1]
                    live += buffer[0]
                    made.append((tensor, buffer))
            yield live + node.backward_scratch
            for tensor in {kept.base for kept in node.saved if not kept.base.parameter}:
                saved[tensor] -= 1
                if not saved[tensor]:
                    live -= tensor.bytes
            for buffer in arrived:
                live -= _release(buffer)
            for tensor, buffer in made:
                if tensor.parameter:
                    if keep_gradients:
                        live -= _release(buffer)
                    continue
                before = buffers.get(tensor)
                if before is None:
                    buffers[tensor] = buffer
                elif before[1] == 1:  # added in place
                    live -= _release(buffer)
                else:
                    total = [tensor.bytes, 1]
                    live += total[0]
                    yield live
                    live -= _release(buffer)
                    live -= _release(before)
                    buffers[tensor] = total
        yield live


def _release(buffer: list) -> Size:
    buffer[1] -= 1
    return NOTHING if buffer[1] else buffer[0]


def _total(tensors: Iterable[Tensor]) -> Size:
    total = NOTHING
    for tensor in tensors:
        total += tensor.bytes
    return total


def _highest(moments: Iterable[Size]) -> tuple[Size, ...]:
    """Return the moments that are not below another in every part."""
    kept: list[Size] = []
    for moment in sorted(set(moments), reverse=True):
        if not any(all(map(ge, other, moment)) for other in kept):
            kept.append(moment)
    return tuple(kept)
