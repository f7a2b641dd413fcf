"""What each logged number means, which question it answers, and when to worry: what the report says beside a curve."""

import re
from dataclasses import dataclass

QUESTIONS = (
    "Is it learning?",
    "Is it hacking the reward?",
    "Is the update sane?",
    "Where does time go?",
    "Other numbers",
)
_LEARNING, _HACKING, _UPDATE, _TIME, _OTHER = QUESTIONS


@dataclass(frozen=True)
class MetricNote:
    """What a report says about a metric.

    question: the one of `QUESTIONS` that it helps to answer. meaning: what it is, with its unit. worry: when a reader
    should worry; empty where no value alone is a sign. resolution: the smallest difference that means anything, in the
    metric's unit; an axis spans several of these at least, so that rounding errors do not look like a signal.
    """

    question: str
    meaning: str
    worry: str = ""
    resolution: float = 0.0


# Regular expressions of whole names, without a leading "eval_"; the first that fits counts.
_NOTES = {
    r"reward": MetricNote(
        _LEARNING,
        "Sum of a text's rewards, on average, before penalties.",
        "It falls, or rises while texts get shorter or alike.",
        1e-3,
    ),
    r"teacher_nll(_per_token)?": MetricNote(
        _LEARNING,
        "−log p of the text under the teacher, nats per token; lower is better.",
        "It rises, or falls far below the teacher's own.",
        1e-3,
    ),
    r"teacher_nll_per_sequence": MetricNote(
        _LEARNING,
        "−log p of the whole text under the teacher, nats; lower is better.",
        "It falls only because texts get shorter.",
        1e-2,
    ),
    r"student_nll_of_teacher_per_token": MetricNote(
        _LEARNING, "−log p of the teacher's text under the student, nats per token; lower is better.", "", 1e-3
    ),
    r"bleu|ibleu|rouge(1|2|L)": MetricNote(
        _LEARNING, "Likeness to the references, 0 to 100.", "It falls while the reward rises.", 0.1
    ),
    r"(ensemble_)?(accuracy|f1)": MetricNote(_LEARNING, "Right answers on labelled texts, percent.", "It falls.", 0.1),
    r"(ensemble_)?(pearson|spearman)|similarity_spearman|agreement|hidden_cosine": MetricNote(
        _LEARNING, "Likeness of the student's outputs to the teacher's or to the labels, up to 1.", "It falls.", 1e-3
    ),
    r"divergence|divergence/.*|(forward|reverse|skew|skew_reverse)_kl|jsd|tvd": MetricNote(
        _LEARNING, "Distance of the student's distribution from the teacher's, nats per token.", "It rises.", 1e-4
    ),
    r"(immediate|future)(/.*)?": MetricNote(
        _LEARNING, "Part of the all-actions loss: the next token's, or that of what follows.", "", 1e-4
    ),
    r"train_loss": MetricNote(_LEARNING, "Mean of the losses of all steps."),
    r"loss": MetricNote(
        _LEARNING,
        "What the optimizer minimises. With PPO, RLOO and REINFORCE it hovers near 0 by construction: look at reward.",
        "In distillation and supervised training: it rises. Anywhere: nan.",
        1e-4,
    ),
    r"rewards/.*": MetricNote(_LEARNING, "One term of the reward, summed over a text, on average.", "", 1e-3),
    r"completions/mean_length|tokens|length_words": MetricNote(
        _HACKING,
        "Mean length of the texts: tokens, EOS included, or words.",
        "It drifts away from the teacher's while the reward rises.",
        0.1,
    ),
    r"length_ratio": MetricNote(_HACKING, "Length over the references' length.", "It moves away from 1.", 1e-2),
    r"(completions/)?eos_rate": MetricNote(
        _HACKING,
        "Share of texts that end with EOS, not at the length cap.",
        "Well below 1: texts are cut.",
        1e-2,
    ),
    r"completions/distinct|distinct_outputs": MetricNote(
        _HACKING, "Share of prompts with a text of their own.", "It falls: the same text for many prompts.", 1e-2
    ),
    r"distinct[12]": MetricNote(
        _HACKING, "Share of different words, or word pairs, among all that were written.", "It falls.", 1e-3
    ),
    r"repetition": MetricNote(_HACKING, "Share of repeated word groups in a text.", "It rises.", 1e-2),
    r"guards_raised": MetricNote(
        _HACKING, "Warnings: texts got worse while the reward rose, or all alike.", "Above 0: read the log.", 1.0
    ),
    r"kl": MetricNote(
        _HACKING, "Distance from the student at the start, nats per text.", "It grows without end.", 1e-2
    ),
    r"entropy": MetricNote(
        _HACKING, "How undecided the student is, nats per token.", "It falls to 0: collapse. It jumps: noise.", 1e-2
    ),
    r"reward_std": MetricNote(
        _HACKING, "Spread of the texts' rewards.", "Near 0: all texts alike, nothing is left to learn from.", 1e-3
    ),
    r"approx_kl": MetricNote(
        _UPDATE,
        "How far one update moves the policy, nats per token.",
        "Above about 0.1, or it jumps: steps are too large.",
        1e-4,
    ),
    r"clip_fraction|value_clip_fraction": MetricNote(
        _UPDATE, "Share of tokens whose update was clipped.", "Above about 0.3: steps are too large.", 1e-3
    ),
    r"ratio": MetricNote(_UPDATE, "New over old probability of a token, on average.", "It moves away from 1.", 1e-3),
    r"grad_norm": MetricNote(
        _UPDATE, "Length of the gradient before clipping.", "Spikes, or it grows steadily.", 1e-3
    ),
    r"learning_rate": MetricNote(_UPDATE, "The optimizer's step size."),
    r"value_loss": MetricNote(_UPDATE, "The critic's squared error.", "It rises: advantages are noise.", 1e-4),
    r"explained_variance": MetricNote(
        _UPDATE,
        "Share of the returns' variance that the critic foresees; 1 is perfect.",
        "Below 0 for long: the critic is worse than a constant.",
        1e-2,
    ),
    r"average_reward": MetricNote(_UPDATE, "Mean reward per token, which is subtracted from each.", "", 1e-3),
    r"beta": MetricNote(_UPDATE, "Weight of the KL penalty.", "It grows without end: the student runs away.", 1e-4),
    r"behaviour_lag": MetricNote(
        _UPDATE, "Updates since the sampling policy was renewed.", "Far above the set interval.", 1.0
    ),
    r"student_samples": MetricNote(_UPDATE, "Share of rollouts that the student wrote.", "", 1e-2),
    r"steps_skipped|samples_dropped|samples_not_finite": MetricNote(
        _UPDATE, "Updates or texts left out, as a number was NaN or infinite.", "Above 0.", 1.0
    ),
    r"seconds/.*": MetricNote(_TIME, "Wall-clock seconds of one rollout spent in this phase.", "", 1e-2),
    r".*runtime": MetricNote(_TIME, "Wall-clock seconds in all.", "", 1e-1),
    r".*_per_second": MetricNote(
        _TIME, "Speed of this machine.", "It falls: something else runs here, or texts get longer.", 1e-1
    ),
    r".*(_mse|_ce|_kl|_cosine|cosine)": MetricNote(_LEARNING, "One of the losses that are summed.", "It rises.", 1e-5),
    r"total_flos|parameters|num_tokens|epoch": MetricNote(_TIME, "Amount of work."),
}


def note_on(name: str) -> MetricNote:
    """The note on a metric; one without text for a name that is not known, such as that of a user's own metric."""
    plain = re.sub(r"^eval_", "", name)
    return next((note for pattern, note in _NOTES.items() if re.fullmatch(pattern, plain)), MetricNote(_OTHER, ""))
