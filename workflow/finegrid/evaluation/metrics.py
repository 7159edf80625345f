"""The one definition of quality: scores of an answer against its reference, from the field's libraries.

Used by :mod:`finegrid.evaluation.evaluate` on the generated answers; reads and writes no files. Per example, all
0..1, higher is better:

==============  ======================================================================================================
`exact_match`   1 if the words of both are the same after normalising (below)
`f1`            harmonic mean of precision and recall over the bag of words, as in SQuAD v1.1
`rouge1/2/L`    F-measure of `rouge-score` (Lin, 2004), without a stemmer
`bleu`          sentence BLEU-4 of `sacrebleu`, exponential smoothing, effective order
`chrf`          chrF2 of `sacrebleu` (character 6-grams, beta 2)
==============  ======================================================================================================

`corpus_bleu` and `corpus_chrf` are sacrebleu's own corpus scores (0..100, the order not effective): they pool counts
over all examples and differ from the mean of the sentence scores. "BLEU-4" means either of them, and others, in other
tools; :func:`signatures` says which is which.

How text is split into words depends on the reference's language, so all runs split an example alike:

- `en`: exact match and F1 as in SQuAD v1.1 (lower case; ASCII punctuation and a, an, the removed), ROUGE with
  rouge-score's tokenizer, BLEU with 13a.
- `zh`: exact match and F1 over Chinese characters and Latin words (as in CMRC 2018), ROUGE over jieba's words, all
  after Unicode NFKC so that full-width signs match; BLEU with sacrebleu's `zh`.
- `other`, found by `auto` only, for scripts that rouge-score would throw away (Cyrillic, Arabic, …): runs of word
  characters in lower case; BLEU with 13a.

An empty prediction scores 0 in every metric.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from sacrebleu.metrics import BLEU, CHRF

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

METRICS_VERSION = "1"
SCORES = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf")

_ROUGE = ("rouge1", "rouge2", "rougeL")
_BLEU_TOKENIZERS = {"en": "13a", "zh": "zh", "other": "13a"}
# Han, kana and half-width kana: written without spaces.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_WORD = re.compile(rf"[^\W_{_CJK}]+")
_CJK_CHARACTER_OR_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True)
class SplitScores:
    """Scores of one split.

    Attributes:
        scores: per example, the metrics of `SCORES`, each 0..1.
        statistics: per example, integer counts whose sums over any sample of examples give its corpus scores
            (:func:`corpus_bleu`, :func:`corpus_chrf`): `bleu` = [prediction length, reference length, matches of 1- to
            4-grams, 1- to 4-grams of the prediction]; `chrf` = [n-grams of the prediction, of the reference, matches]
            for n = 1..6.
        summary: means of the scores (0..1), `corpus_bleu`, `corpus_chrf` (0..100), `empty_predictions` (count).
        signatures: :func:`signatures` of these scores.
    """

    scores: list[dict[str, float]]
    statistics: list[dict[str, list[int]]]
    summary: dict[str, float]
    signatures: dict[str, object]


def score_split(predictions: Sequence[str], references: Sequence[str], language: str = "auto") -> SplitScores:
    """Score each prediction against the one reference of the same position, and all of them together.

    Args:
        language: `en`, `zh`, or `auto`: :func:`detect_language` of each reference; corpus BLEU then takes the
            tokenizer of the majority.
    """
    languages = [detect_language(text) if language == "auto" else language for text in references]
    pairs = list(zip(predictions, references, languages, strict=True))
    scores = [score_example(*pair) for pair in pairs]
    tokenizer = corpus_tokenizer(languages)
    statistics = [_statistics(prediction, reference, tokenizer) for prediction, reference, _ in pairs]
    summary = {name: math.fsum(row[name] for row in scores) / len(scores) for name in SCORES} if scores else {}
    if scores:
        summary["corpus_bleu"] = corpus_bleu(row["bleu"] for row in statistics)
        summary["corpus_chrf"] = corpus_chrf(row["chrf"] for row in statistics)
    summary["empty_predictions"] = sum(not prediction.strip() for prediction in predictions)
    return SplitScores(scores, statistics, summary, signatures(languages))


def score_example(prediction: str, reference: str, language: str) -> dict[str, float]:
    """Return the metrics of `SCORES` for one answer, each 0..1; all 0 for an empty prediction.

    Args:
        language: `en`, `zh` or `other`.
    """
    if not prediction.strip():
        return dict.fromkeys(SCORES, 0.0)
    words, expected = answer_words(prediction, language), answer_words(reference, language)
    rouge = _rouge_scorer(language).score(reference, prediction)
    bleu = _bleu(_BLEU_TOKENIZERS[language], effective_order=True)
    return {
        "exact_match": float(words == expected),
        "f1": _f1(words, expected),
        **{name: float(rouge[name].fmeasure) for name in _ROUGE},
        "bleu": bleu.sentence_score(prediction, [reference]).score / 100,
        "chrf": _chrf().sentence_score(prediction, [reference]).score / 100,
    }


def detect_language(text: str) -> str:
    """Return `zh` if a text has more CJK characters than other words, `other` if most of its letters are not ASCII,
    else `en`."""
    words = _WORD.findall(text)
    if len(_CJK_CHARACTER.findall(text)) > len(words):
        return "zh"
    letters = [letter for word in words for letter in word if letter.isalpha()]
    return "other" if 2 * sum(letter.isascii() for letter in letters) < len(letters) else "en"


def answer_words(text: str, language: str) -> list[str]:
    """Return the words that exact match and F1 compare.

    Source of `en`: `normalize_answer` of the SQuAD v1.1 evaluation script; of `zh`: `mixed_segmentation` of CMRC 2018.
    """
    if language == "en":
        text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()
    if language == "zh":
        return _CJK_CHARACTER_OR_WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return _unicode_words(text)


def corpus_tokenizer(languages: Iterable[str]) -> str:
    """Return sacrebleu's tokenizer for corpus BLEU: that of the majority of examples (`13a` in a tie)."""
    counts = Counter(_BLEU_TOKENIZERS[language] for language in languages)
    return "zh" if counts["zh"] > counts["13a"] else "13a"


def corpus_bleu(statistics: Iterable[Sequence[int]]) -> float:
    """Return sacrebleu's corpus BLEU (0..100) from the `bleu` statistics of its examples."""
    total = [sum(column) for column in zip(*statistics, strict=True)]
    return BLEU.compute_bleu(total[2:6], total[6:], total[0], total[1], smooth_method="exp").score


def corpus_chrf(statistics: Iterable[Sequence[int]]) -> float:
    """Return sacrebleu's corpus chrF2 (0..100) from the `chrf` statistics of its examples."""
    return _chrf()._compute_score_from_stats([sum(column) for column in zip(*statistics, strict=True)]).score


def signatures(languages: Sequence[str]) -> dict[str, object]:
    """Return what makes scores comparable: for each metric its options and library version, `languages` (examples split
    which way) and, where it was used, jieba's version."""
    corpus = corpus_tokenizer(languages)
    sentence = sorted({_BLEU_TOKENIZERS[language] for language in languages})
    words = "en:squad-v1.1|zh:nfkc+cmrc2018-characters|other:unicode-words"
    tokenizers = {"en": "default", "zh": "jieba", "other": "unicode-words"}
    rouge = "+".join(tokenizers[name] for name in sorted(set(languages)))
    found = {
        **dict.fromkeys(("exact_match", "f1"), words),
        **dict.fromkeys(_ROUGE, f"fmeasure|stemmer:no|tok:{rouge}|version:{metadata.version('rouge-score')}"),
        "bleu": " and ".join(_signature(_bleu(tokenizer, effective_order=True)) for tokenizer in sentence),
        "chrf": _signature(_chrf()),
        "corpus_bleu": _signature(_bleu(corpus, effective_order=False)),
        "corpus_chrf": _signature(_chrf()),
        "languages": {name: languages.count(name) for name in sorted(set(languages))},
    }
    if "zh" in languages:
        found["jieba"] = metadata.version("jieba")
    return found


# ---------------------------------------------------------------- the parts


def _f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))


def _statistics(prediction: str, reference: str, tokenizer: str) -> dict[str, list[int]]:
    bleu = _bleu(tokenizer, effective_order=False)
    # sacrebleu has no public name for these counts; a test holds their sums equal to its corpus scores.
    return {
        "bleu": bleu._extract_corpus_statistics([prediction], [[reference]])[0],
        "chrf": _chrf()._extract_corpus_statistics([prediction], [[reference]])[0],
    }


@cache
def _bleu(tokenizer: str, effective_order: bool) -> BLEU:
    # `force` only switches off a warning about answers that end in " .".
    return BLEU(tokenize=tokenizer, effective_order=effective_order, smooth_method="exp", force=True)


@cache
def _chrf() -> CHRF:
    return CHRF()


def _signature(metric: BLEU | CHRF) -> str:
    metric.num_refs = 1
    return str(metric.get_signature())


@cache
def _rouge_scorer(language: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # half a second of a start, and losses alone need none
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizers = {"en": DefaultTokenizer, "zh": JiebaTokenizer, "other": UnicodeTokenizer}
    return RougeScorer(list(_ROUGE), tokenizer=tokenizers[language]())


class JiebaTokenizer:
    """Chinese words for rouge-score: jieba's precise mode after NFKC and lower case, punctuation left out."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``."""
        words = _jieba().lcut(unicodedata.normalize("NFKC", text).lower())
        return [word for word in words if any(sign.isalnum() for sign in word)]


class UnicodeTokenizer:
    """Words of any script that writes spaces, for rouge-score: runs of word characters in lower case."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``."""
        return _unicode_words(text)


def _unicode_words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


@cache
def _jieba():
    with warnings.catch_warnings():  # jieba imports setuptools' deprecated pkg_resources
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel("WARNING")
    return jieba
