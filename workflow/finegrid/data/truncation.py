"""Cut a conversation to its limits: contents only, each side by its own policy, and never to teach what is not so.

The prompt (all up to the start of the last answer, template included) is bound by ``max_input_length``, the last
answer with its end token by ``max_output_length``. Tokens of the template and the roles always stay.

What is cut, by policy:

* ``left``: from the beginning. In a prompt of several turns the oldest messages lose their content first.
* ``right``: from the end. In a prompt the newest messages lose their content first.
* ``middle``: from the middle, of the answer or of all the prompt's contents taken together.
* ``drop``: the row is left out, with a reason. ``error``: the stage stops and names the row.

System messages are never cut: they say what holds for every turn. A prompt that would keep nothing of its turns, or
an answer that would keep nothing, drops its row with a reason.

What is taught: **a token that stood behind something cut away has no label.** So a cut under ``right`` leaves the end
of the turn unlabelled (a cut answer never teaches a false end), and under ``left`` and ``middle`` the end, which is
real and stands behind the answer's own last words, keeps its label while the token at the seam loses its own. The
same holds for earlier answers in a cut prompt. A cut never goes through a character of several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from finegrid.data.template import Content, Tokens

Policy = Literal["left", "right", "middle", "drop", "error"]


class TooLong(Exception):
    """A side is over its limit under the policy ``drop`` or ``error``, or cannot be brought under it.

    Attributes:
        reason: ``prompt_too_long``, ``answer_too_long``, ``prompt_limit_leaves_no_content`` or
            ``answer_limit_leaves_no_content``.
        stops: the policy is ``error``.
        detail: lengths and limit, for the user.
    """

    def __init__(self, reason: str, detail: str, stops: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.stops = reason, detail, stops


@dataclass(frozen=True)
class Cut:
    """A row as it is trained on: ``ids`` and ``taught`` of equal length, ``ids[:prompt_length]`` the prompt.

    ``end_lost`` tells that the answer's end would have been taught and no longer is.
    """

    ids: np.ndarray
    taught: np.ndarray
    prompt_length: int
    truncated_prompt: bool
    truncated_answer: bool
    end_lost: bool


def truncate(row: Tokens, max_input: int, max_output: int, input_policy: Policy, output_policy: Policy) -> Cut:
    """Return ``row`` within its limits, in tokens.

    Raises:
        TooLong: the row is to be dropped, or the policy is ``error``.
    """
    prompt_over = row.prompt_length - max_input
    answer_over = len(row.ids) - row.prompt_length - max_output
    if prompt_over <= 0 and answer_over <= 0:
        return Cut(row.ids, row.taught, row.prompt_length, False, False, False)
    _refuse(row, "prompt", row.prompt_length, max_input, "max_input_length", input_policy)
    _refuse(row, "answer", len(row.ids) - row.prompt_length, max_output, "max_output_length", output_policy)
    keep = np.ones(len(row.ids), dtype=bool)
    *before, answer = row.contents
    if prompt_over > 0:
        keep[_prompt_cut(before, prompt_over, max_input, input_policy)] = False
    if answer_over > 0:
        keep[_answer_cut(answer, answer_over, max_output, output_policy)] = False
    _widen(keep, row.contents, row.splits)
    taught = _taught_after(keep, row)
    ends_now = bool(taught[answer.stop :].any())
    return Cut(
        row.ids[keep],
        taught[keep],
        int(keep[: row.prompt_length].sum()),
        prompt_over > 0,
        answer_over > 0,
        row.ends and not ends_now,
    )


def _refuse(row: Tokens, side: str, length: int, limit: int, key: str, policy: Policy) -> None:
    if length <= limit or policy not in ("drop", "error"):
        return
    answer = len(row.ids) - row.prompt_length
    detail = f"prompt {row.prompt_length} tokens, answer {answer} tokens; {key} is {limit}"
    raise TooLong(f"{side}_too_long", detail, stops=policy == "error")


def _prompt_cut(contents: Sequence[Content], over: int, limit: int, policy: Policy) -> np.ndarray:
    """Return the positions to cut from the prompt's turns, taken together in their order."""
    turns = [np.arange(content.start, content.stop) for content in contents if content.role != "system"]
    positions = np.concatenate([*turns, np.arange(0)])
    if over >= len(positions):
        needed = over + limit - len(positions)
        detail = f"template and system message take {needed} tokens; max_input_length is {limit}"
        raise TooLong("prompt_limit_leaves_no_content", detail)
    return _choose(positions, over, policy)


def _answer_cut(content: Content, over: int, limit: int, policy: Policy) -> np.ndarray:
    """Return the positions to cut from the last answer."""
    positions = np.arange(content.start, content.stop)
    if over >= len(positions):
        needed = over + limit - len(positions)
        detail = f"the end of turn takes {needed} tokens; max_output_length is {limit}"
        raise TooLong("answer_limit_leaves_no_content", detail)
    return _choose(positions, over, policy)


def _choose(positions: np.ndarray, count: int, policy: Policy) -> np.ndarray:
    """Return the ``count`` positions that the policy cuts from a sequence of content positions."""
    kept = len(positions) - count
    start = {"left": 0, "right": kept, "middle": (kept + 1) // 2}[policy]
    return positions[start : start + count]


def _widen(keep: np.ndarray, contents: Sequence[Content], splits: Callable[[int], bool]) -> None:
    """Cut a few tokens more where a cut would go through a character."""
    for content in contents:
        cut = np.flatnonzero(~keep[content.start : content.stop]) + content.start
        if not len(cut):
            continue
        start, stop = int(cut[0]), int(cut[-1]) + 1
        while start > content.start and splits(start):
            start -= 1
        while stop < content.stop and splits(stop):
            stop += 1
        keep[start:stop] = False


def _taught_after(keep: np.ndarray, row: Tokens) -> np.ndarray:
    """Return what is still taught: nothing cut, no token at a seam, no end of a message that lost its last words."""
    taught = row.taught & keep
    nexts = [content.start for content in row.contents[1:]] + [len(row.ids)]
    for content, following in zip(row.contents, nexts, strict=True):
        if keep[content.start : content.stop].all():
            continue
        if not keep[content.stop - 1]:
            taught[content.stop : following] = False
            continue
        seam = content.start + int(np.flatnonzero(~keep[content.start : content.stop])[-1]) + 1
        taught[seam] = False
    return taught
