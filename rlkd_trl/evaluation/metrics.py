"""Text metrics: how close outputs are to their references, how varied, how long.

Pure functions on strings. `outputs[i]` is one completion, `references[i]` the list of texts that it may match (their
number may differ between rows), `sources[i]` the text that it was made from. Words are what whitespace separates.
"""

import math
from collections.abc import Sequence

from sacrebleu.metrics import BLEU

from rlkd_trl.errors import InputError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002), as sacrebleu computes it (Post 2018).

    sacrebleu's defaults: 13a tokenizer, case kept, up to 4-grams, exponential smoothing. BLEU is defined by
    4-grams: a corpus in which no output has four tokens scores 0, even where it equals its references.

    Raises InputError: no outputs, another number of rows of references than of outputs, or a row without reference.
    """
    _check_references(outputs, references)
    # sacrebleu reads "streams": the first reference of every row, then the second, ... None marks a missing one.
    most = max(len(row) for row in references)
    streams = [[row[k] if k < len(row) else None for row in references] for k in range(most)]
    return BLEU().corpus_score(list(outputs), streams).score


def sentence_bleu(output: str, references: Sequence[str]) -> float:
    """BLEU of one output against all of its references at once, 0 to 100, smoothed as in sacrebleu's `sentence_bleu`.

    The first n-gram order without a match counts half a match, the next a quarter, and so on (Chen & Cherry 2014,
    method 3). Orders longer than the output are left out: unlike `bleu`, a text of fewer than four tokens that equals
    its reference scores 100. Without a word in common it is 0.

    Raises InputError: as `bleu`.
    """
    _check_references([output], [references])
    return BLEU(effective_order=True).sentence_score(output, list(references)).score


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, use_stemmer: bool = True
) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1, each 0 to 100 (Lin 2004), as rouge-score computes them.

    For each output and each type the best of its references counts; the result is the mean over outputs.
    `use_stemmer` applies Porter's (English) stemmer to words longer than three letters, as ROUGE-1.5.5 `-m` does
    and summarisation papers report; switch it off for other languages. ROUGE-L is of the text as one sequence.

    Limit: the tokenizer lower-cases and keeps only a-z and 0-9. "café" is read as "caf", and a text in another
    script has no words left and scores 0.

    Raises InputError: as `bleu`.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, as it imports NLTK, which takes long

    _check_references(outputs, references)
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=use_stemmer)
    best = [scorer.score_multi(row, output) for output, row in zip(outputs, references, strict=True)]
    return {kind: 100 * math.fsum(scores[kind].fmeasure for scores in best) / len(best) for kind in ROUGE_TYPES}


def distinct_n(outputs: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the whole corpus, 0 to 1; 0.0 where no output has n words.

    Diversity (Li et al. 2016). The denominator is the number of n-grams, as is usual; the paper writes the number
    of words, which differs for n > 1. The value falls as a corpus grows: compare corpora of equal size.

    Raises InputError: no outputs, or n < 1.
    """
    _check_texts("outputs", outputs)
    if n < 1:
        raise InputError(f"distinct_n needs n >= 1, not {n}.")
    ngrams = []
    for output in outputs:
        words = output.split()
        ngrams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_outputs(outputs: Sequence[str]) -> float:
    """Distinct texts over all texts of the corpus, above 0 to 1: near 0 where a model says the same to every input.

    The value falls as a corpus grows: compare corpora of equal size. Raises InputError: no outputs.
    """
    _check_texts("outputs", outputs)
    return len(set(outputs)) / len(outputs)


def self_bleu(samples: Sequence[Sequence[str]]) -> float:
    """How alike the samples of one input are, 0 to 100: lower is more diverse (Zhu et al. 2018, "Texygen").

    `samples[i]` are two or more texts for input i. Each is scored against the others of its input as references, and
    the scores are averaged over samples, then over inputs. (The paper, which generates without inputs, takes all
    generated texts as each other's references.) The score is sacrebleu's sentence BLEU with effective order: as
    `bleu`, but 4-grams do not count where a text is too short to have any. It rises with the number of samples:
    compare equal numbers.

    Raises InputError: no inputs, an input with fewer than two samples, or a sample that is no string.
    """
    if len(samples) == 0:
        raise InputError("samples is empty; there is nothing to measure.")
    metric = BLEU(effective_order=True)
    scores = []
    for row, texts in enumerate(samples):
        _check_texts(f"samples of row {row}", texts)
        if len(texts) < 2:
            raise InputError(f"samples, row {row} (counting from 0) has one sample; self_bleu compares two or more.")
        other_samples = [[*texts[:k], *texts[k + 1 :]] for k in range(len(texts))]
        scores_of_row = [
            metric.sentence_score(text, rest).score for text, rest in zip(texts, other_samples, strict=True)
        ]
        scores.append(math.fsum(scores_of_row) / len(scores_of_row))
    return math.fsum(scores) / len(scores)


def ibleu(
    outputs: Sequence[str], sources: Sequence[str], references: Sequence[Sequence[str]], alpha: float = 0.8
) -> float:
    """Paraphrase quality: α BLEU(output, references) − (1 − α) BLEU(output, source) (Sun & Zhou 2012).

    From −100 (1 − α) to 100 α: copying the source is penalised. The paper advises α between 0.7 and 0.9.

    Raises InputError: as `bleu`, another number of sources than outputs, or α outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"ibleu needs alpha between 0 and 1, not {alpha}.")
    _check_references(outputs, references)
    _check_same_length(outputs, "sources", sources)
    return alpha * bleu(outputs, references) - (1 - alpha) * bleu(outputs, [[source] for source in sources])


def mean_length(outputs: Sequence[str]) -> float:
    """Mean number of words of an output. Raises InputError: no outputs."""
    _check_texts("outputs", outputs)
    return sum(len(output.split()) for output in outputs) / len(outputs)


def length_ratio(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Words of all outputs over words of each one's closest-length reference; below 1 is too short.

    The choice is that of BLEU's brevity penalty (Papineni et al. 2002): the reference whose length is nearest to
    the output's, the shorter of two equally near. NaN where the chosen references hold no word at all.

    Raises InputError: as `bleu`.
    """
    _check_references(outputs, references)
    total_output = total_reference = 0
    for output, row in zip(outputs, references, strict=True):
        length = len(output.split())
        total_output += length
        total_reference += min((len(text.split()) for text in row), key=lambda words: (abs(words - length), words))
    return total_output / total_reference if total_reference else math.nan


def text_metrics(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]] | None,
    sources: Sequence[str] | None = None,
) -> dict[str, float]:
    """Every metric of this module that the data allow.

    Keys: `bleu`, `rouge1`, `rouge2`, `rougeL` (0 to 100), `distinct1`, `distinct2`, `distinct_outputs` (0 to 1),
    `length_words` (mean words), `length_ratio`, and `ibleu` where sources are given. Where `references` is None, or
    any row has no reference, only the distinct ones and `length_words`.

    Raises InputError: no outputs, or another number of references or sources than outputs.
    """
    without_references = {
        "distinct1": distinct_n(outputs, 1),
        "distinct2": distinct_n(outputs, 2),
        "distinct_outputs": distinct_outputs(outputs),
        "length_words": mean_length(outputs),
    }
    if sources is not None:
        _check_same_length(outputs, "sources", sources)
    if references is None:
        return without_references
    _check_same_length(outputs, "references", references)
    if any(len(row) == 0 for row in references):
        return without_references

    metrics = {"bleu": bleu(outputs, references), **rouge(outputs, references), **without_references}
    metrics["length_ratio"] = length_ratio(outputs, references)
    if sources is not None:
        metrics["ibleu"] = ibleu(outputs, sources, references)
    return metrics


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InputError(f"{name} is one string, {texts[:40]!r}; give a list of strings.")
    if len(texts) == 0:
        raise InputError(f"{name} is empty; there is nothing to measure.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}, row {row} (counting from 0): {text!r} is not a string.")


def _check_same_length(outputs: Sequence[str], name: str, texts: Sequence) -> None:
    if len(outputs) != len(texts):
        raise InputError(f"There are {len(outputs)} outputs but {len(texts)} {name}; give one per output.")


def _check_references(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check_texts("outputs", outputs)
    _check_same_length(outputs, "references", references)
    for row, texts in enumerate(references):
        # A string would be read as one reference per character, and the score would silently be nonsense.
        if isinstance(texts, str):
            raise InputError(f"references, row {row} (counting from 0) is one string; give a list: [{texts[:40]!r}].")
        if len(texts) == 0:
            raise InputError(f"references, row {row} (counting from 0) is empty; this metric needs at least one.")
        _check_texts(f"references of row {row}", texts)
