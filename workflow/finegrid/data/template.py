"""A conversation becomes tokens, with the knowledge of what each token is: template, content, taught or not.

Second half of the data's way (clean -> **tokenise** -> train). Nothing here is guessed about a chat template:

* The template is rendered once for each sequence of roles with a mark in place of every content. That gives its
  *literals*; each real conversation must then be, character by character, these literals with its own contents
  between them (a template may trim a content), else the row is refused.
* What the model is asked to write begins where the template's own prompt ends: the prompt
  (``add_generation_prompt``) of the messages before an assistant message must be the beginning of the whole
  conversation, as text and as tokens, else the row is refused or the template is, by name.
* What carries loss comes from the template's ``{% generation %}`` marks; without them it is the assistant's text up
  to and including the turn's end, the first special token that the template writes after a closing answer.

A conversation is encoded once, as a whole, and places in the text are found among the tokens by their offsets.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from finegrid.data.words import WordEncoder
from finegrid.errors import UserError
from finegrid.startup import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

# For base models that come without a template: headers in plain text, so that no token is new to the model, and the
# tokenizer's own end token after each answer. The header ends with a line break, never a space: a space would melt
# into the answer's first word and the prompt would be no prefix of the conversation.
PLAIN_TEMPLATE = (
    "{{ bos_token if add_bos else '' }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{{ eos_token + '\n' if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}"
    "{{ '### Assistant:\n' if add_generation_prompt else '' }}"
)

# Llama 3.1 and 3.2 write today's date unless told one: then the same data would give other tokens tomorrow. This is
# the date those templates use when no clock is at hand.
FIXED_DATE = "26 Jul 2024"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NEVER = re.compile(r"(?!)")


class RowRefused(Exception):
    """One row cannot be used; ``reason`` is short and the same for every row of its kind, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Content:
    """Tokens ``start:stop`` of a row that are one message's content and nothing of the template."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Tokens:
    """One conversation up to the end of its last answer, before any cut.

    Attributes:
        ids: token ids, int32, shape (n,).
        taught: which tokens carry loss, bool, shape (n,); never the first, which nothing predicts.
        contents: the content of each message, in order; the last one is the last answer's.
        prompt_length: tokens from which the last answer is generated; the answer, its end included, is the rest.
        ends: the last token of the answer closes the turn and is taught.
        splits: ``splits(i)`` tells whether a cut before token ``i`` would go through a character.
    """

    ids: np.ndarray
    taught: np.ndarray
    contents: tuple[Content, ...]
    prompt_length: int
    ends: bool
    splits: Callable[[int], bool]


@dataclass(frozen=True)
class _Answer:
    """Where the answer of message ``message`` lies around its content, in characters of the template's literals."""

    message: int
    lead: int  # characters between the end of the prompt and the content: most often 0
    end: int  # characters after the content up to the end of the turn: "<|im_end|>"


@dataclass(frozen=True)
class _Skeleton:
    """What the template writes around the contents of one sequence of roles."""

    roles: tuple[str, ...]
    literals: tuple[str, ...]
    answers: tuple[_Answer, ...]
    tail: str | None  # end of the prompt from its last special token on; None: the prompt has none there
    append_end: bool  # the template closes no turn: the tokenizer's end token is added after the last answer
    structure: tuple[str, ...]  # special tokens which a text must not hold, for they would forge a turn


@dataclass(frozen=True)
class _Row:
    """A conversation up to its last answer, and what the template writes around its contents."""

    messages: Messages
    skeleton: _Skeleton


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text; places are characters."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answer_start: int
    taught: tuple[tuple[int, int], ...]
    skeleton: _Skeleton


class ChatTemplate:
    """A tokenizer together with the chat template that writes its conversations.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed).
        template: Jinja text.
        source: ``tokenizer``, ``file`` or ``plain``: where the template is from.
        place: how messages to the user name the template.
        end_ids: ids at which the model stops generating, from its generation settings.

    Raises:
        UserError: the tokenizer is not a fast one, or the template cannot be read, or it writes no prompt for a
            plain question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        source: str = "tokenizer",
        place: str = "chat template",
        end_ids: Sequence[int] = (),
    ):
        if not tokenizer.is_fast:
            raise UserError(
                f"{place}: the tokenizer has no tokenizer.json (it is not a fast one); expected one that has"
            )
        self.tokenizer, self.template, self.source, self.place = tokenizer, template, source, place
        self._backend = _exact_backend(tokenizer)
        self._encoder = WordEncoder(self._backend)
        self.marked = bool(_GENERATION.search(template))
        self.end_ids = frozenset([*end_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._special = frozenset(token.content for token in added if token.special)
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names))) if names else _NEVER
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.skeleton = functools.cache(self._skeleton)
        self._tail_ids = functools.cache(self._encode_alone)
        self._probe()

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """Return the conversation as text; with ``prompt`` also the header that asks for the next answer."""
        return self._render([messages], prompt)[0][0]

    def encode(self, rows: Sequence[Messages]) -> list[Tokens | RowRefused]:
        """Tokenise conversations, each up to its last assistant message; one result a row, in order.

        A row which cannot be used comes back as the :class:`RowRefused` that says why.

        Raises:
            UserError: the template's prompt is no beginning of the conversations it writes.
        """
        rendered = self._rendered([self._attempt(self._question, row) for row in rows])
        texts = [item.text for item in rendered if isinstance(item, _Rendered)]
        # The template writes every special token: to have them added once more is how a BOS gets doubled.
        encodings = iter(self._encoder.encode_batch(texts))
        return [
            item if isinstance(item, RowRefused) else self._attempt(self._align, item, next(encodings))
            for item in rendered
        ]

    def end_of_turn(self) -> str:
        """Return the text that closes an answer, as tokens that are taught: ``<|im_end|>``, or the added end token."""
        skeleton = self.skeleton(("user", "assistant"))
        return self.tokenizer.eos_token if skeleton.append_end else skeleton.literals[-1][: skeleton.answers[-1].end]

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the template: source, how loss is found, what ends a turn.

        ``stop_token_ids`` is where generation must stop: where the model does, and at the end that it is taught,
        which a base model's own settings do not know.
        """
        end = self.end_of_turn()
        end_ids = self._encode_alone(end)
        return {
            "source": self.source,
            "loss": "generation marks" if self.marked else "verified prefixes",
            "end_of_turn": end,
            "end_token_ids": end_ids,
            "stop_token_ids": sorted(self.end_ids | set(end_ids[-1:])),
            "end_added": self.skeleton(("user", "assistant")).append_end,
        }

    def findings(self) -> list[dict[str, str]]:
        """Return what a user should know about the template, as findings (severity, place, message, mend)."""
        skeleton = self.skeleton(("user", "assistant"))
        found = []

        def warn(message: str, mend: str) -> None:
            found.append({"severity": "warning", "place": self.place, "message": message, "mend": mend})

        if self.source == "plain":
            warn("the model has no chat template; Finegrid's plain one is used", "name one in model.chat_template")
        if skeleton.append_end:
            warn(
                f"the template closes no turn; {self.tokenizer.eos_token} is added after the last answer only",
                "for several turns use a template that writes an end token after each answer",
            )
        if self.marked and not self._marks_cover_end():
            warn(
                "the generation marks leave out the turn's end token: the model is not taught to stop",
                "move {% endgeneration %} behind the end token",
            )
        if "strftime_now" in self.template and "date_string" not in self.template:
            warn("the template writes today's date: tomorrow's tokens differ", "name a template with a fixed date")
        bos = self.tokenizer.bos_token
        if self._adds_bos and not skeleton.literals[0].startswith(bos):
            warn(
                f"the tokenizer adds {bos} by itself, the template does not write it: there is none, as in generation",
                "write {{ bos_token }} at the start of the template if the model expects it",
            )
        return found

    # ---- text ----------------------------------------------------------------------------------------------------

    def _render(
        self, rows: Sequence[Messages], prompt: bool, marks: bool = False
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Return the text of each row and, with ``marks``, the character ranges of its generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, ranges = render_jinja_template(
            conversations=[[{key: message[key] for key in ("role", "content")} for message in row] for row in rows],
            chat_template=self.template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            add_bos=self._adds_bos,
            date_string=FIXED_DATE,
            **self.tokenizer.special_tokens_map,
        )
        return texts, [list(found) for found in ranges] if marks else [[] for _ in rows]

    def _attempt(self, function: Callable, *arguments) -> Any:
        try:
            return function(*arguments)
        except RowRefused as refused:
            return refused
        except TemplateError as error:
            return RowRefused(f"template_refuses: {error}")

    def _question(self, messages: Messages) -> _Row:
        """Return the row up to its last answer, with the literals of its roles."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise RowRefused("no_answer")
        messages = messages[: last + 1]
        skeleton = self.skeleton(tuple(message["role"] for message in messages))
        if any(token in message["content"] for message in messages for token in skeleton.structure):
            raise RowRefused("special_token_in_text")
        return _Row(messages, skeleton)

    def _rendered(self, rows: Sequence[_Row | RowRefused]) -> list[_Rendered | RowRefused]:
        """Render the rows that are not refused yet, and place what is in them."""
        good = [row for row in rows if isinstance(row, _Row)]
        # All in one call: for a short row, what transformers does around a template costs as much as the template.
        try:
            texts, marks = self._render([row.messages for row in good], prompt=False, marks=self.marked)
            asked = [row.messages[:-1] for row in good if len(row.messages) > 1]
            prompts = iter(self._render(asked, prompt=True)[0])
        except TemplateError as error:
            if len(rows) == 1:
                return [RowRefused(f"template_refuses: {error}")]
            return [self._rendered([row])[0] for row in rows]
        found = zip(texts, marks, strict=True)
        return [
            self._attempt(self._place, row, *next(found), next(prompts) if len(row.messages) > 1 else None)
            if isinstance(row, _Row)
            else row
            for row in rows
        ]

    def _place(self, row: _Row, text: str, marks: list[tuple[int, int]], prompt: str | None) -> _Rendered:
        """Find a row's contents, its last answer's start and what is taught in its text, in characters.

        ``prompt`` is what generation would be given for the answer; None: there is nothing before it.
        """
        skeleton, contents = row.skeleton, [message["content"] for message in row.messages]
        spans = _match(skeleton.literals, text, contents)
        if spans is None:
            # An answer that brings its own thinking block stands where the template would write an empty one.
            skeleton = _without_lead(skeleton)
            spans = _match(skeleton.literals, text, contents)
        if spans is None:
            raise RowRefused("template_changes_the_text")
        answer_start = spans[-1][0] - skeleton.answers[-1].lead
        if prompt is not None and prompt != text[:answer_start]:
            raise RowRefused("prompt_is_no_prefix")
        if skeleton.append_end:
            # What follows may melt with the answer's last character into one token ("." + line breaks).
            text = text[: spans[-1][1]]
        taught = self._taught(row.messages, spans, skeleton, marks)
        return _Rendered(text, tuple(spans), answer_start, tuple(taught), skeleton)

    def _taught(
        self, messages: Messages, spans: list[tuple[int, int]], skeleton: _Skeleton, marks: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return character ranges that carry loss; messages with ``loss: false`` have none."""
        if not self.marked:
            return [
                (spans[answer.message][0] - answer.lead, spans[answer.message][1] + answer.end)
                for answer in skeleton.answers
                if messages[answer.message].get("loss", True)
            ]
        ranges = []
        for start, stop in marks:
            # A mark belongs to the message in which it begins: the first whose content does not end before it.
            message = next((i for i, span in enumerate(spans) if span[1] >= start), len(spans) - 1)
            if messages[message].get("loss", messages[message]["role"] == "assistant"):
                ranges.append((start, stop))
        return ranges

    # ---- tokens --------------------------------------------------------------------------------------------------

    def _align(self, row: _Rendered, encoding) -> Tokens:
        """Find the places of a rendered row among its tokens."""
        at = functools.partial(_token_at, encoding, len(row.text))
        ids = np.array(encoding.ids, dtype=np.int32)
        contents = _content_tokens(row, encoding, at)
        taught = np.zeros(len(ids), dtype=bool)
        for start, stop in row.taught:
            stop = min(stop, len(row.text))
            if start >= stop:
                continue
            first = at(start)
            if not self.marked and first < len(encoding) and encoding.token_to_chars(first)[0] < start:
                raise RowRefused("answer_starts_inside_a_token")
            taught[first : at(stop - 1) + 1] = True
        ends = bool(taught[contents[-1].stop :].any())
        if row.skeleton.append_end:
            ends = bool(row.taught) and row.taught[-1][1] >= row.spans[-1][1]
            ids, taught = np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(taught, ends)
        else:
            # Nothing after the answer's end is kept: it has no loss and, read from left to right, changes none.
            end = at(row.spans[-1][1] + row.skeleton.answers[-1].end - 1) + 1
            end = max(end, int(np.flatnonzero(taught)[-1]) + 1 if taught.any() else 0)
            ids, taught = ids[:end], taught[:end]
        joined = at(row.answer_start)
        first, alone = self._prompt_end(row, encoding, ids, joined, at)
        ids = np.concatenate([ids[:first], alone, ids[joined:]])
        taught = np.concatenate([taught[:first], np.zeros(len(alone), dtype=bool), taught[joined:]])
        taught[:1] = False
        moved = first + len(alone) - joined
        *before, answer = contents
        answer = Content(answer.role, answer.start + moved, answer.stop + moved)
        splits = functools.partial(_splits, encoding, joined + moved, moved)
        return Tokens(ids, taught, (*before, answer), joined + moved, ends, splits)

    def _prompt_end(self, row: _Rendered, encoding, ids: np.ndarray, joined: int, at) -> tuple[int, np.ndarray]:
        """Return the tokens that stand for ``ids[first:joined]`` when the prompt is tokenised alone, after ``first``.

        Generation sees the prompt alone, so that is how it must be tokenised in the row: ``ids[:joined]`` if that is
        the same, and else with the end that it has alone ("\\n\\n" is one token or, before a letter, two for some
        tokenizers), provided that the answer begins with a token of its own. Special tokens are split off before
        anything else is: the prompt's end from its last one on can be tokenised by itself, and is the same short text
        for all rows.
        """
        tail = row.skeleton.tail
        text = row.text[: row.answer_start]
        alone = np.array(self._encode_alone(text) if tail is None else self._tail_ids(tail), dtype=np.int32)
        first = 0 if tail is None else at(len(text) - len(tail))
        if np.array_equal(ids[first:joined], alone):
            return joined, alone[:0]
        if tail is None or (joined < len(encoding) and encoding.token_to_chars(joined)[0] != row.answer_start):
            raise RowRefused("answer_starts_inside_a_token")
        return first, alone

    def _encode_alone(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    # ---- the template's literals ---------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Try the template on a question and its answer, so that a template at fault is named before any row."""
        try:
            skeleton = self.skeleton(("user", "assistant"))
        except (RowRefused, TemplateError) as error:
            raise UserError(
                f"{self.place}: a question with its answer cannot be written with it ({error}); "
                "expected a Jinja template for messages with `role` and `content`"
            ) from error
        bos = self.tokenizer.bos_token
        if bos and skeleton.literals[0].startswith(bos + bos):
            raise UserError(f"{self.place}: it begins with {bos} twice; expected it once")
        row = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
        (tokens,) = self.encode([row])
        if isinstance(tokens, RowRefused):
            raise UserError(
                f"{self.place}: {tokens.reason}: the prompt {self.render(row[:1], prompt=True)[-40:]!r}, tokenised "
                "alone, is not how the tokens of the whole conversation begin; expected a prompt that ends where a "
                "token ends (no trailing space)"
            )

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        text = self.render(marked)
        literals, spans = _literals(text, marked)
        wanted = [i for i, role in enumerate(roles) if role == "assistant" and (i == len(roles) - 1 or not self.marked)]
        answers = tuple(
            _Answer(i, self._lead(marked, i, text, spans), self._turn_end(marked, i, literals[i + 1])) for i in wanted
        )
        last = literals[-2]
        prompt = last[: len(last) - answers[-1].lead]
        specials = list(self._added.finditer(prompt))
        if not answers[-1].end and self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.place}: it closes no turn and the tokenizer has no end token; expected one of them")
        written = {match.group() for literal in literals for match in self._added.finditer(literal)}
        ends = {self.tokenizer.eos_token, self.tokenizer.bos_token} - {None}
        return _Skeleton(
            roles=roles,
            literals=literals,
            answers=answers,
            tail=prompt[specials[-1].start() :] if specials else None,
            append_end=not answers[-1].end,
            structure=tuple(sorted((written | ends) & self._special)),
        )

    def _lead(self, marked: Messages, i: int, text: str, spans: list[tuple[int, int]]) -> int:
        """Return how many characters before the content of message ``i`` are already its answer, verified."""
        prompt = self._prompt(marked, i, text, spans)
        floor = spans[i - 1][1] if i else 0
        if not text.startswith(prompt) or not floor <= len(prompt) <= spans[i][0]:
            raise UserError(
                f"{self.place}: the prompt for message {i + 1} of {' '.join(m['role'] for m in marked)}, which ends "
                f"with {_readable(prompt[-60:])!r}, is not how the conversation begins, which has there "
                f"{_readable(text[: len(prompt)][-60:])!r}; expected a template whose `add_generation_prompt` gives "
                "the beginning, or one with {% generation %} marks"
            )
        lead = text[len(prompt) : spans[i][0]]
        if any(token in lead for token in self._special):
            raise UserError(
                f"{self.place}: it has no `add_generation_prompt`: an answer would begin with its own header "
                f"{lead!r}; expected that header at the end of the prompt"
            )
        return len(lead)

    def _prompt(self, marked: Messages, i: int, text: str, spans: list[tuple[int, int]]) -> str:
        if i:
            return self.render(marked[:i], prompt=True)
        # Templates need a message to write a prompt after: for an answer that opens the conversation, the header that
        # they write after a question must stand right before it.
        question = [{"role": "user", "content": "\ue000?\ue001"}]
        without, with_header = self.render(question), self.render(question, prompt=True)
        header = with_header[len(without) :]
        if not with_header.startswith(without) or not header or not text[: spans[0][0]].endswith(header):
            raise RowRefused("opens_with_an_answer")
        return text[: spans[0][0]]

    def _turn_end(self, marked: Messages, i: int, literal: str) -> int:
        """Return how many characters of ``literal``, written after message ``i``, end the turn; 0: it has no end."""
        last = i == len(marked) - 1
        closing = literal if last else self.render(marked[: i + 1]).rpartition(marked[i]["content"])[2]
        found = self._added.search(closing)
        if found:
            return found.end() if literal.startswith(closing[: found.end()]) else 0
        # ChatGLM: no end is written, but the next turn's first token is one at which generation stops.
        found = self._added.match(literal)
        return found.end() if found and self.tokenizer.convert_tokens_to_ids(found.group()) in self.end_ids else 0

    def _marks_cover_end(self) -> bool:
        row = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
        (tokens,) = self.encode([row])
        return tokens.ends


def load_template(model: Path, chat_template: str | None = None, trust_remote_code: bool = False) -> ChatTemplate:
    """Return the tokenizer of the local model folder ``model`` with the template that its conversations use.

    The file ``chat_template`` comes first, then the tokenizer's own template, then :data:`PLAIN_TEMPLATE`.

    Raises:
        UserError: no such folder or file, no tokenizer in it, or a template that cannot be used.
    """
    if not model.is_dir():
        raise UserError(f"model.model_name_or_path: {model} is no folder; expected the base model's files")
    try:
        tokenizer = _load_tokenizer(model, trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.model_name_or_path: {model} has no tokenizer that loads ({error})") from error
    if chat_template is not None:
        source, place, template = "file", f"model.chat_template: {chat_template}", _read(Path(chat_template))
    elif tokenizer.chat_template is not None:
        source, place, template = "tokenizer", f"chat template of {model.name}", tokenizer.get_chat_template()
    else:
        source, place, template = "plain", f"plain template for {model.name}", PLAIN_TEMPLATE
    return ChatTemplate(tokenizer, template, source, place, _end_ids(model))


def _load_tokenizer(model: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, as ``AutoTokenizer`` finds it.

    AutoTokenizer looks at the model's configuration, whose own class imports all that a model of the kind may need
    (more than a second). Where ``tokenizer_config.json`` names the tokenizer's class itself, the values are enough.
    """
    with importing():
        from transformers import AutoTokenizer, PreTrainedConfig

    config = None
    named, values = _json(model / "tokenizer_config.json"), _json(model / "config.json")
    if "tokenizer_class" in named and not {"auto_map"} & (named.keys() | values.keys()):
        config = PreTrainedConfig(**{key: values[key] for key in ("model_type", "model_name") if key in values})
        config.name_or_path = str(model)
    return AutoTokenizer.from_pretrained(
        model, config=config, local_files_only=True, trust_remote_code=trust_remote_code
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {path} cannot be read ({error}); expected a Jinja file") from error


def _end_ids(model: Path) -> list[int]:
    """Return the ids at which the model stops, from its generation settings, else its own."""
    for name in ("generation_config.json", "config.json"):
        path = model / name
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _literals(text: str, marked: Messages) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """Return what stands around the marks (one more than there are messages), and where the marks are."""
    literals, spans, position = [], [], 0
    for message in marked:
        start = text.find(message["content"], position)
        if start < 0 or text.count(message["content"]) != 1:
            raise RowRefused(f"template_leaves_out_or_repeats: a message of the {message['role']}")
        literals.append(text[position:start])
        position = start + len(message["content"])
        spans.append((start, position))
    return (*literals, text[position:]), spans


def _without_lead(skeleton: _Skeleton) -> _Skeleton:
    """Return the skeleton of a last answer whose content begins right behind the prompt."""
    *before, last = skeleton.literals[:-1]
    *others, answer = skeleton.answers
    return replace(
        skeleton,
        literals=(*before, last[: len(last) - answer.lead], skeleton.literals[-1]),
        answers=(*others, replace(answer, lead=0)),
    )


def _match(literals: Sequence[str], text: str, contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where each content stands if ``text`` is the literals with the contents between them, else None.

    A content may stand there trimmed and, before the last message, without its thinking: templates leave that out of
    what they keep of earlier turns.
    """
    spans, position = [], 0
    for i, (literal, following, content) in enumerate(zip(literals, literals[1:], contents, strict=False)):
        if not text.startswith(literal, position):
            return None
        position += len(literal)
        forms = [content, content.rstrip(), content.lstrip(), content.strip(), content.strip("\n")]
        if i < len(contents) - 1:
            forms.append(content.rpartition("</think>")[2].lstrip("\n"))
        for form in forms:
            if text.startswith(form, position) and text.startswith(following, position + len(form)):
                break
        else:
            return None
        spans.append((position, position + len(form)))
        position += len(form)
    return spans if text[position:] == literals[-1] else None


def _exact_backend(tokenizer: PreTrainedTokenizerBase):
    """Return the tokenizer's core with true offsets (some leave the space before a word out of them) and no limits.

    The tokenizer itself is left as it is; a copy costs about half a second and is made only if needed.
    """
    from tokenizers import Tokenizer, processors

    backend = tokenizer.backend_tokenizer
    trims = backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__()
    if not trims and backend.truncation is None and backend.padding is None:
        return backend
    backend = Tokenizer.from_str(backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _content_tokens(row: _Rendered, encoding, at: Callable[[int], int]) -> list[Content]:
    contents = []
    for role, (start, stop) in zip(row.skeleton.roles, row.spans, strict=True):
        first = at(start)
        # A token that begins before the content is the template's as well: it is never cut.
        first += first < len(encoding) and encoding.token_to_chars(first)[0] < start
        contents.append(Content(role, first, max(first, at(stop))))
    return contents


def _token_at(encoding, characters: int, place: int) -> int:
    """Return the first token that holds the character at ``place`` or, if none does, that begins after it.

    ``characters`` is the length of the text; the answer for its end is the number of tokens.
    """
    if place >= characters:
        return len(encoding)
    token = encoding.char_to_token(place)
    if token is not None:
        return token
    # No token holds it: normalised away, or white space that this kind of tokenizer drops.
    after = (i for i, (start, stop) in enumerate(encoding.offsets) if start >= place and stop > start)
    return next(after, len(encoding))


def _splits(encoding, answer: int, moved: int, token: int) -> bool:
    """Tell whether ``token`` begins inside a character: byte-level tokens of one character share its offsets.

    From the token ``answer`` on, a row's tokens stand ``moved`` places from where the encoding has them.
    """
    token -= moved if token > answer else 0
    if not 0 < token < len(encoding):
        return False
    return encoding.token_to_chars(token)[0] < encoding.token_to_chars(token - 1)[1]


def _readable(text: str) -> str:
    return re.sub("\ue000(.*?)\ue001", r"<message \1>", text)
