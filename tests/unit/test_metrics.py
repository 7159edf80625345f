"""Metrics against the libraries called on their own, closed forms and hand-made cases."""

from __future__ import annotations

import math
import random
from importlib.metadata import version

import pytest
import sacrebleu
from finegrid.evaluation import metrics
from finegrid.evaluation.metrics import SCORES, detect_language, score_example, score_split
from rouge_score import rouge_scorer

ENGLISH = [
    ("Yes, most plans cover eye exams.", "Most plans cover an eye exam, yes."),
    ("Medicare pays nothing.", "Medicare Part B pays 80 percent of the approved amount after your deductible."),
    ("It depends on your state.", "It depends on your state and on your insurer; ask an agent for a quote."),
    ("Term life insurance ends after a fixed term", "Term life insurance ends after a fixed term."),
]
CHINESE = [
    ("医疗保险通常不支付眼科检查的费用。", "大多数医疗保险不支付眼科检查。"),
    ("这取决于您所在的州。", "这取决于您所在的州,请咨询您的代理人。"),
    ("SR22是保险公司提交的证明。", "SR22 是保险公司向州政府提交的证明文件。"),
]


def columns(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [prediction for prediction, _ in pairs], [reference for _, reference in pairs]


# ---------------------------------------------------------------- against the libraries, called on their own


@pytest.mark.parametrize(("pairs", "language", "tokenizer"), [(ENGLISH, "en", "13a"), (CHINESE, "zh", "zh")])
def test_bleu_and_chrf_are_sacrebleus(pairs, language, tokenizer):
    predictions, references = columns(pairs)
    scored = score_split(predictions, references, language)
    for row, prediction, reference in zip(scored.scores, predictions, references, strict=True):
        bleu = sacrebleu.sentence_bleu(prediction, [reference], tokenize=tokenizer, use_effective_order=True)
        assert row["bleu"] == pytest.approx(bleu.score / 100, abs=1e-12)
        assert row["chrf"] == pytest.approx(sacrebleu.sentence_chrf(prediction, [reference]).score / 100, abs=1e-12)
    bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer)
    assert scored.summary["corpus_bleu"] == pytest.approx(bleu.score, abs=1e-10)
    assert scored.summary["corpus_chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)


def test_english_rouge_is_rouge_scores_without_stemmer():
    library = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for prediction, reference in ENGLISH:
        expected = library.score(reference, prediction)
        scores = score_example(prediction, reference, "en")
        assert {name: scores[name] for name in expected} == {n: s.fmeasure for n, s in expected.items()}
    assert score_example("exams", "exam", "en")["rouge1"] == 0


def test_summary_is_the_mean_of_the_examples():
    scored = score_split(*columns(ENGLISH))
    for name in SCORES:
        assert scored.summary[name] == pytest.approx(sum(row[name] for row in scored.scores) / len(ENGLISH))
        assert all(0 <= row[name] <= 1 for row in scored.scores)


# ---------------------------------------------------------------- closed forms, counted by hand


def test_scores_of_a_pair_counted_by_hand():
    """6 words against 6: 5 unigrams, 3 bigrams, 1 trigram and no 4-gram match; longest common subsequence 5."""
    scores = score_example("a b c x e f".upper(), "a b c d e f".upper(), "other")
    assert scores["rouge1"] == pytest.approx(5 / 6)
    assert scores["rouge2"] == pytest.approx(3 / 5)
    assert scores["rougeL"] == pytest.approx(5 / 6)
    assert scores["f1"] == pytest.approx(5 / 6)
    assert scores["exact_match"] == 0
    # Precisions 5/6, 3/5, 1/4 and, smoothed, 1/2 of 1/3; equal lengths, so no brevity penalty.
    assert scores["bleu"] == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_short_prediction_pays_the_brevity_penalty_on_effective_orders_only():
    """Two words of four, both right: orders 1 and 2 only, penalty exp(1 - 4/2)."""
    assert score_example("w x", "w x y z", "en")["bleu"] == pytest.approx(math.exp(-1))


def test_chrf_of_one_letter_pairs():
    """'ab' against 'abc': precisions 1, 1; recalls 2/3, 1/2; F2 of the means (order 3 has no n-gram in 'ab')."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert score_example("ab", "abc", "en")["chrf"] == pytest.approx(5 * precision * recall / (4 * precision + recall))


@pytest.mark.parametrize(
    ("prediction", "reference", "exact_match", "f1"),
    [
        ("The policy lapses.", "a policy  lapses", 1, 1),  # articles, case, punctuation, white space
        ("policy lapses today", "the policy lapses", 0, 4 / 5),
        ("yes yes yes", "yes", 0, 1 / 2),  # a repeated word counts once
        ("no", "yes", 0, 0),
    ],
)
def test_exact_match_and_f1_follow_squad(prediction, reference, exact_match, f1):
    scores = score_example(prediction, reference, "en")
    assert scores["exact_match"] == exact_match
    assert scores["f1"] == pytest.approx(f1)


# ---------------------------------------------------------------- Chinese


def test_chinese_f1_counts_characters_and_latin_words():
    """保险是SR22 against 保险SR22: 4 and 3 units, 3 in common."""
    assert score_example("保险是SR22", "保险 SR22。", "zh")["f1"] == pytest.approx(2 * 3 / 7)
    assert score_example("保险SR22。", "保险 SR22,", "zh")["exact_match"] == 1


def test_chinese_rouge_counts_jiebas_words():
    """医疗保险 | 很 | 贵 against 医疗保险 | 便宜: one word in common of 3 and 2, no bigram."""
    scores = score_example("医疗保险很贵。", "医疗保险便宜。", "zh")
    assert scores["rouge1"] == pytest.approx(2 * 1 / 5)
    assert scores["rouge2"] == 0
    assert score_example("医疗保险便宜", "医疗保险便宜。", "zh")["rougeL"] == 1


def test_full_width_signs_match_in_chinese():
    scores = score_example("SR22 费用为100元", "SR22费用为100元", "zh")
    assert (scores["exact_match"], scores["rouge1"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Medicare pays.", "en"),
        ("", "en"),
        ("Déductible réglé", "en"),
        ("医疗保险不支付", "zh"),
        ("SR22 是 State Farm 提交的证明文件", "zh"),
        ("The word 保险 means insurance in Chinese", "en"),
        ("Страховка оплачивает лечение", "other"),
    ],
)
def test_language_is_detected_by_script(text, language):
    assert detect_language(text) == language


def test_scripts_that_rouge_score_drops_are_still_scored():
    scored = score_split(["Страховка оплачивает лечение"], ["Страховка оплачивает лечение."])
    assert all(scored.scores[0][name] == 1 for name in ("exact_match", "f1", "rouge1", "rouge2", "rougeL"))


def test_auto_splits_each_example_by_its_reference_and_the_corpus_by_majority():
    predictions, references = columns(CHINESE + ENGLISH[:1])
    scored = score_split(predictions, references)
    expected = [score_example(*pair, "zh") for pair in CHINESE] + [score_example(*ENGLISH[0], "en")]
    assert scored.scores == expected
    corpus = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh")
    assert scored.summary["corpus_bleu"] == pytest.approx(corpus.score)
    assert "tok:zh" in scored.signatures["corpus_bleu"]
    assert scored.signatures["languages"] == {"en": 1, "zh": 3}


# ---------------------------------------------------------------- what goes wrong elsewhere


@pytest.mark.parametrize("prediction", ["", "  \n"])
@pytest.mark.parametrize("reference", ["Most plans cover it.", "医疗保险不支付", "Страховка", "", "the", "?"])
def test_empty_prediction_scores_zero_everywhere(prediction, reference):
    scored = score_split([prediction], [reference])
    assert scored.scores == [dict.fromkeys(SCORES, 0.0)]
    assert all(scored.summary[name] == 0 for name in (*SCORES, "corpus_bleu", "corpus_chrf"))
    assert scored.summary["empty_predictions"] == 1


def test_empty_predictions_stay_in_the_means_and_in_the_corpus():
    predictions, references = columns(ENGLISH)
    full = score_split(predictions, references).summary
    with_empty = score_split([*predictions, ""], [*references, "Ask your agent about it."]).summary
    for name in SCORES:
        assert with_empty[name] == pytest.approx(full[name] * 4 / 5)
    assert with_empty["corpus_bleu"] < full["corpus_bleu"]


@pytest.mark.parametrize("prediction", ["...", "\U0001f600", "the", "\ufffd", "\x00", "a" * 5000])
def test_predictions_without_words_do_not_crash(prediction):
    for language in ("en", "zh", "other"):
        scores = score_example(prediction, "Most plans cover it.", language)
        assert all(0 <= scores[name] <= 1 for name in SCORES)


def test_no_examples_give_no_means():
    assert score_split([], []).summary == {"empty_predictions": 0}


def test_which_bleu_4_is_said():
    """Three tools call three numbers of the same four pairs "bleu-4": ours says sentence mean (0..1) and corpus."""
    predictions, references = columns(ENGLISH)
    scored = score_split(predictions, references)
    sentence, corpus = scored.summary["bleu"], scored.summary["corpus_bleu"]
    expected = [sacrebleu.sentence_bleu(p, [r]).score for p, r in ENGLISH]
    assert sentence == pytest.approx(sum(expected) / 4 / 100)
    assert corpus == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    assert abs(100 * sentence - corpus) > 1
    library = f"tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert scored.signatures["bleu"] == f"nrefs:1|case:mixed|eff:yes|{library}"
    assert scored.signatures["corpus_bleu"] == f"nrefs:1|case:mixed|eff:no|{library}"


def test_signatures_are_the_same_before_and_after_scoring_and_name_every_library():
    languages = ["zh", "zh", "en"]
    before = metrics.signatures(languages)
    score_split(*columns(CHINESE[:2] + ENGLISH[:1]))
    assert metrics.signatures(languages) == before
    assert set(before) == {*SCORES, "corpus_bleu", "corpus_chrf", "languages", "jieba"}
    assert before["rougeL"] == f"fmeasure|stemmer:no|tok:default+jieba|version:{version('rouge-score')}"
    assert "tok:13a" in before["bleu"]
    assert "tok:zh" in before["bleu"]
    assert before["jieba"] == version("jieba")


# ---------------------------------------------------------------- sufficient statistics


def test_statistics_of_a_resample_give_the_corpus_scores_of_that_resample():
    pairs = ENGLISH * 3 + [("", "Ask your agent."), ("Ask.", "Ask your agent about it.")]
    predictions, references = columns(pairs)
    statistics = score_split(predictions, references, "en").statistics
    drawn = random.Random(0).choices(range(len(pairs)), k=len(pairs))
    bleu = sacrebleu.corpus_bleu([predictions[i] for i in drawn], [[references[i] for i in drawn]])
    chrf = sacrebleu.corpus_chrf([predictions[i] for i in drawn], [[references[i] for i in drawn]])
    assert metrics.corpus_bleu(statistics[i]["bleu"] for i in drawn) == pytest.approx(bleu.score)
    assert metrics.corpus_chrf(statistics[i]["chrf"] for i in drawn) == pytest.approx(chrf.score)
    assert len(statistics[0]["bleu"]) == 10
    assert len(statistics[0]["chrf"]) == 18
