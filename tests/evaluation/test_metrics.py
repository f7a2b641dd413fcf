import math
import random

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.metrics import (
    bleu,
    distinct_n,
    distinct_outputs,
    ibleu,
    length_ratio,
    mean_length,
    rouge,
    self_bleu,
    sentence_bleu,
    text_metrics,
)

# Two segments, the first with two references. Capitals stand for words.
#
#   row 0  output  A B C D E      references  A B C D F  and  X B C D E Y   (lengths 5 and 6; nearest to 5 is 5)
#   row 1  output  G H G H        reference   G H I J                       (length 4)
#
#   1-grams: row 0 all 5 occur in one reference or the other; row 1 G and H once each in the reference, so each of
#            the two G and two H is clipped to 1: 2 of 4                    correct 7 of 9
#   2-grams: row 0 AB BC CD | DE (second reference): 4 of 4; row 1 GH HG GH, GH clipped to 1: 1 of 3    5 of 7
#   3-grams: row 0 ABC BCD CDE: 3 of 3; row 1 GHG HGH: 0 of 2                                           3 of 5
#   4-grams: row 0 ABCD BCDE: 2 of 2; row 1 GHGH: 0 of 1                                                2 of 3
#   output length 9, reference length 5 + 4 = 9: no brevity penalty
OUTPUTS = ["A B C D E", "G H G H"]
REFERENCES = [["A B C D F", "X B C D E Y"], ["G H I J"]]
BLEU_BY_HAND = 100 * (7 / 9 * 5 / 7 * 3 / 5 * 2 / 3) ** (1 / 4)  # 100 (2/9)^(1/4) = 68.66

# Every metric that takes references, on the same arguments.
WITH_REFERENCES = [bleu, rouge, length_ratio, lambda outputs, references: ibleu(outputs, outputs, references)]


def test_bleu_of_two_segments_and_several_references_by_hand():
    assert pytest.approx(68.66, abs=0.005) == BLEU_BY_HAND
    assert bleu(OUTPUTS, REFERENCES) == pytest.approx(BLEU_BY_HAND)


def test_bleu_brevity_penalty_by_hand():
    # All n-grams occur; 4 words against 6: exp(1 − 6/4).
    assert bleu(["A B C D"], [["A B C D E F"]]) == pytest.approx(100 * math.exp(-0.5))


def test_bleu_takes_the_row_with_more_references_first_or_last():
    assert bleu(OUTPUTS[::-1], REFERENCES[::-1]) == pytest.approx(BLEU_BY_HAND)


def test_a_missing_reference_is_not_an_empty_one():
    # Were row 1 padded with "", its nearest length would be 0 instead of 4, and the penalty exp(1 − 8/5) vanish.
    outputs, references = ["A B C D", "E"], [["A B C D", "A B C D Q"], ["E F G H"]]
    # n-grams: 5/5 · 3/3 · 2/2 · 1/1; lengths 5 against 4 + 4.
    assert bleu(outputs, references) == pytest.approx(100 * math.exp(1 - 8 / 5))


def test_bleu_of_identical_texts_is_100_and_of_foreign_ones_0():
    texts = ["The cat sat on the mat.", "Größe: 5 µm – schön!"]
    assert bleu(texts, [[text] for text in texts]) == pytest.approx(100)
    assert bleu(["a b c d"], [["w x y z"]]) == 0


def test_bleu_without_any_four_tokens_is_0():
    assert bleu(["A B C"], [["A B C"]]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("output", "references", "score"),
    [
        # 1-grams 3/5, 2-grams AB BC 2/4, 3-grams ABC 1/3, 4-grams 0 of 2: half a match, 1/4
        ("A B C X Y", ["A B C D E"], (3 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** (1 / 4)),
        # 1-grams A B 2/4, 2-grams 0 of 3: ½ / 3, 3-grams 0 of 2: ¼ / 2, 4-grams 0 of 1: ⅛
        ("A X B Y", ["A P B Q"], (2 / 4 * 1 / 6 * 1 / 8 * 1 / 8) ** (1 / 4)),
        # every 1- and 2-gram occurs, of 3 there are none; 2 words against 3
        ("A B", ["A B C"], math.exp(1 - 3 / 2)),
        ("A B C", ["A B C"], 1),
        # against both at once every n-gram occurs, and 5 words are as near as can be
        ("A B C D E", ["A B C D F", "X B C D E Y"], 1),
        ("A B C D E", ["A B C D F"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ("W", ["A B C"], 0),
        ("", ["A B C"], 0),
    ],
)
def test_sentence_bleu_by_hand(output, references, score, caplog):
    assert sentence_bleu(output, references) == pytest.approx(100 * score)
    assert not caplog.records, "sacrebleu warns of settings that are not meant for sentences"


def test_rouge_by_hand():
    # output  "the cat ran home"; reference "the dog ran far home"
    #   1-grams: the, ran, home: precision 3/4, recall 3/5, F1 = 2·3/(4 + 5) = 2/3
    #   2-grams: none in common (the cat, cat ran, ran home | the dog, dog ran, ran far, far home)
    #   longest common subsequence: the ran home, 3 words: F1 = 2/3
    # output  "b a"; reference "a b": 1-grams F1 = 1; 2-grams 0; subsequence 1 word: F1 = 2·1/(2 + 2) = 1/2
    scores = rouge(["the cat ran home", "b a"], [["the dog ran far home"], ["a b"]])
    assert scores == pytest.approx({"rouge1": 100 * (2 / 3 + 1) / 2, "rouge2": 0, "rougeL": 100 * (2 / 3 + 1 / 2) / 2})


def test_rouge_takes_the_best_reference_of_each_kind_by_itself():
    # output "a b c": against "c b a" 1-grams match wholly, 2-grams not at all, subsequence 1 of 3;
    # against "a b" 1-grams F1 = 2·2/(3 + 2) = 0.8, 2-grams 2·1/(2 + 1) = 2/3, subsequence 0.8.
    scores = rouge(["a b c"], [["c b a", "a b"]])
    assert scores == pytest.approx({"rouge1": 100, "rouge2": 100 * 2 / 3, "rougeL": 80})


def test_rouge_stemming():
    # Porter: "walking" → "walk", "walked" → "walk".
    assert rouge(["walking"], [["walked"]])["rouge1"] == pytest.approx(100)
    assert rouge(["walking"], [["walked"]], use_stemmer=False)["rouge1"] == 0


def test_rouge_sees_only_ascii_letters_and_digits():
    assert rouge(["привет мир"], [["привет мир"]])["rouge1"] == 0
    # "café" is read as "caf", and so is "cafè".
    assert rouge(["café"], [["cafè"]])["rouge1"] == pytest.approx(100)


def test_distinct_by_hand():
    # words: a b a b a c: distinct a, b, c: 3 of 6
    # pairs: ab ba ab | ac (not b-a across the two outputs): distinct ab, ba, ac: 3 of 4
    outputs = ["a b a b", "a c"]
    assert distinct_n(outputs, 1) == pytest.approx(3 / 6)
    assert distinct_n(outputs, 2) == pytest.approx(3 / 4)


def test_distinct_of_outputs_that_are_too_short_is_0():
    assert distinct_n(["", "  "], 1) == 0.0
    assert distinct_n(["a", "b"], 2) == 0.0
    # The short output adds nothing to either count: one pair, distinct.
    assert distinct_n(["a", "b c"], 2) == 1.0


def test_distinct_outputs_by_hand():
    assert distinct_outputs(["a b", "a b", "a  b", "b a"]) == 3 / 4
    assert distinct_outputs(["the same"] * 8) == 1 / 8
    with pytest.raises(InputError, match="outputs is empty"):
        distinct_outputs([])


def test_ibleu_by_hand():
    # BLEU(output, source): "G H G H" against itself and "A B C D E" against "A B C D Z":
    #   1-grams 4 + 4 of 9, 2-grams 3 + 3 of 7, 3-grams 2 + 2 of 5, 4-grams 1 + 1 of 3; lengths equal.
    sources = ["A B C D Z", "G H G H"]
    source_bleu = 100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** (1 / 4)
    assert ibleu(OUTPUTS, sources, REFERENCES) == pytest.approx(0.8 * BLEU_BY_HAND - 0.2 * source_bleu)
    assert ibleu(OUTPUTS, sources, REFERENCES, alpha=0.7) == pytest.approx(0.7 * BLEU_BY_HAND - 0.3 * source_bleu)
    assert ibleu(OUTPUTS, sources, REFERENCES, alpha=1) == pytest.approx(BLEU_BY_HAND)
    assert ibleu(OUTPUTS, sources, REFERENCES, alpha=0) == pytest.approx(-source_bleu)


def test_length_ratio_takes_the_nearest_reference_and_the_shorter_of_two():
    # row 0: 3 words; references 7 and 4: nearest 4. row 1: 4 words; references 6 and 2, both 2 away: the shorter, 2.
    outputs = ["a b c", "a b c d"]
    references = [["r r r r r r r", "r r r r"], ["r r r r r r", "r r"]]
    assert length_ratio(outputs, references) == pytest.approx((3 + 4) / (4 + 2))


def test_length_ratio_without_a_word_to_compare_with_is_nan():
    assert math.isnan(length_ratio(["a"], [[""]]))
    assert length_ratio(["", "a"], [["b"], ["c"]]) == pytest.approx(1 / 2)


def test_mean_length():
    assert mean_length(["one  two\nthree", ""]) == pytest.approx(3 / 2)


def test_the_order_of_references_and_of_rows_does_not_matter():
    rng = random.Random(0)
    words = ["a", "b", "c", "d", "e", "f"]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(4, 8)))

    outputs = [text() for _ in range(12)]
    references = [[text() for _ in range(rng.randint(1, 4))] for _ in outputs]
    sources = [text() for _ in outputs]
    rows = list(range(12))
    rng.shuffle(rows)
    shuffled = text_metrics(
        [outputs[i] for i in rows],
        [rng.sample(references[i], k=len(references[i])) for i in rows],
        [sources[i] for i in rows],
    )
    assert shuffled == pytest.approx(text_metrics(outputs, references, sources))


def test_a_further_reference_equal_to_the_output_makes_the_score_perfect():
    references = [[*row, output] for row, output in zip(REFERENCES, OUTPUTS, strict=True)]
    assert bleu(OUTPUTS, references) == pytest.approx(100)
    assert rouge(OUTPUTS, references) == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100})
    assert length_ratio(OUTPUTS, references) == pytest.approx(1)


def test_text_metrics_has_every_key():
    keys = {"bleu", "rouge1", "rouge2", "rougeL", "distinct1", "distinct2", "distinct_outputs"}
    keys |= {"length_words", "length_ratio"}
    metrics = text_metrics(OUTPUTS, REFERENCES)
    assert set(metrics) == keys
    assert set(text_metrics(OUTPUTS, REFERENCES, OUTPUTS)) == keys | {"ibleu"}
    assert all(type(value) is float for value in metrics.values())
    # distinct words A B C D E G H: 7 of 9; distinct pairs AB BC CD DE GH HG: 6 of 7; words (5 + 4)/2; 9 against 9.
    assert metrics["bleu"] == pytest.approx(BLEU_BY_HAND)
    assert metrics["distinct1"] == pytest.approx(7 / 9)
    assert metrics["distinct2"] == pytest.approx(6 / 7)
    assert metrics["length_words"] == pytest.approx(4.5)
    assert metrics["length_ratio"] == pytest.approx(1)


@pytest.mark.parametrize("references", [None, [[], []], [["G"], []]])
def test_text_metrics_without_references(references):
    found = text_metrics(OUTPUTS, references, OUTPUTS)
    assert set(found) == {"distinct1", "distinct2", "distinct_outputs", "length_words"}


@pytest.mark.parametrize("metric", WITH_REFERENCES)
@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 outputs but 1 references"),
        ([], [], "outputs is empty"),
        (["a", "b"], [["a"], []], "row 1 "),
        (["a", "b"], [["a"], "b c"], "row 1 .*one string"),
        (["a", None], [["a"], ["b"]], "outputs, row 1 .*None"),
        (["a", "b"], [["a"], ["b", None]], "row 1, row 1 .*None"),
        ("ab", [["a"], ["b"]], "outputs is one string"),
    ],
)
def test_wrong_input_is_named(metric, outputs, references, message):
    with pytest.raises(InputError, match=message):
        metric(outputs, references)


def test_wrong_input_of_the_other_metrics_is_named():
    for references, message in (("b c", "one string"), ([], "is empty"), ([None], "None is not a string")):
        with pytest.raises(InputError, match=message):
            sentence_bleu("a", references)
    with pytest.raises(InputError, match="None is not a string"):
        sentence_bleu(None, ["a"])
    with pytest.raises(InputError, match="n >= 1, not 0"):
        distinct_n(["a"], 0)
    for metric in (lambda outputs: distinct_n(outputs, 1), mean_length, lambda outputs: text_metrics(outputs, None)):
        with pytest.raises(InputError, match="outputs is empty"):
            metric([])
    with pytest.raises(InputError, match=r"alpha between 0 and 1, not 1\.5"):
        ibleu(["a"], ["a"], [["a"]], alpha=1.5)
    with pytest.raises(InputError, match="2 sources"):
        ibleu(["a"], ["a", "b"], [["a"]])
    with pytest.raises(InputError, match="2 sources"):
        text_metrics(["a"], None, ["a", "b"])
    with pytest.raises(InputError, match="1 outputs but 2 references"):
        text_metrics(["a"], [["a"], ["b"]])


def test_self_bleu_by_hand():
    # "a b" against "a c": 1-grams 1 of 2; 2-grams 0 of 1, which exponential smoothing makes 1/2 of 1; no 3-grams,
    # which effective order leaves out: √(1/2 · 1/2) = 1/2, and the same the other way round.
    assert self_bleu([["a b", "a c"]]) == pytest.approx(50)
    # The mean over samples, each against both others: "a b c d" equals one of them (100), as does its twin; "w x y z"
    # has no word in common with either (0).
    assert self_bleu([["a b c d", "w x y z", "a b c d"]]) == pytest.approx(200 / 3)
    # The mean over inputs. Samples of other inputs are no references, though these would match.
    assert self_bleu([["a b", "a c"], ["a b c d", "w x y z", "a b c d"]]) == pytest.approx((50 + 200 / 3) / 2)
    assert self_bleu([["a b c d", "w x y z"], ["w x y z", "a b c d"]]) == 0


def test_wrong_input_of_self_bleu_is_named():
    for samples, message in (
        ([], "empty"),
        ([["a"]], "row 0 .*one sample"),
        ([["a", "b"], ["a", None]], "row 1.*None"),
    ):
        with pytest.raises(InputError, match=message):
            self_bleu(samples)
