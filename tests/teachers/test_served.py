"""A teacher behind a server: the rewards of the model itself, what is asked, and what goes wrong."""

import html
import json
import os
import signal
import socket
import threading
import time
from urllib.parse import quote

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlkd_trl.errors import InputError, Interrupted, ServerError
from rlkd_trl.ops.rewards import potential_shaping
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.rewards import LogLikelihoodReward, LogRatioReward, RewardInputs, RewardModel, TeacherForcingReward
from rlkd_trl.teachers import Teacher, TeacherPanel, server_signals
from rlkd_trl.teachers.completions_api import CompletionsClient
from rlkd_trl.teachers.served import ServedTeacher
from rlkd_trl.teachers.server_secrets import checked_url
from rlkd_trl.trainers.interruption import StopRequest
from rlkd_trl.trainers.run_record import check_same_run
from tests.teachers.loopback_server import served
from tests.tiny_models import EOS, MODELS, word_tokenizer

TEMPLATES = PromptTemplates([PromptTemplate("before", "w9 {{ source }}"), PromptTemplate("after", "{{ source }} w10")])
COMPLETIONS = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13], [EOS], [14, 15], [16, 17, 18, 19, EOS]]
PROMPTS = ["w3 w4", "w3 w4", "w5", "w6 w7 w8", "w5", "w20"]
KEY = "sk-loopback-5d41402abc4b2a76"


def model():
    return MODELS["llama"](seed=5)


def teacher_at(loopback, **settings) -> ServedTeacher:
    tokenizer = word_tokenizer()
    settings = {"patience": 2.0, "timeout": 60.0, **settings}
    return ServedTeacher(CompletionsClient(loopback.url, tokenizer, **settings), tokenizer)


def inputs(forbidden_V=None) -> RewardInputs:
    width = max(map(len, COMPLETIONS))
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in COMPLETIONS])
    lengths_B = torch.tensor([len(ids) for ids in COMPLETIONS])
    torch.manual_seed(0)
    return RewardInputs(
        rows=[{"prompt": prompt} for prompt in PROMPTS],
        prompt_index_B=torch.arange(len(PROMPTS)),
        completion_ids_BT=ids_BT,
        completion_mask_BT=torch.arange(width)[None, :] < lengths_B[:, None],
        ended_B=torch.tensor([ids[-1] == EOS for ids in COMPLETIONS]),
        student_logps_BT=-torch.rand(ids_BT.shape),
        forbidden_V=forbidden_V,
    )


def shaped(reward, *, gamma: float) -> torch.Tensor:
    """What PPO, RLOO and REINFORCE learn from: r_t + γ Φ_{t+1} − Φ_t."""
    of = inputs()
    reward_model = RewardModel([reward])
    result = reward_model.rewards(of, reward_model.score(of))
    return potential_shaping(result.rewards_BT, result.potentials_BT1, of.completion_mask_BT, of.ended_B, gamma=gamma)


REWARDS = {
    "max": lambda panel: TeacherForcingReward(panel, value="max", gamma=0.9),
    "max, three steps": lambda panel: TeacherForcingReward(panel, value="max", gamma=0.9, k=3),
    "soft": lambda panel: TeacherForcingReward(panel, value="soft", gamma=0.9),
    "log_likelihood": LogLikelihoodReward,
    "log_ratio": LogRatioReward,
}


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_rewards_are_those_of_the_model_itself(dialect):
    """Shaped, as trainers use them, to 1e-4; with two templates, discounting, and completions that were cut off."""
    local = TeacherPanel([Teacher(model(), word_tokenizer())], TEMPLATES)
    with served(model(), word_tokenizer(), dialect=dialect) as loopback:
        far = TeacherPanel([teacher_at(loopback)], TEMPLATES)
        for name, make in REWARDS.items():
            ours, theirs = (shaped(make(panel), gamma=0.9) for panel in (far, local))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            assert theirs.abs().max() > 0.5
        of = inputs()
        ours, theirs = (RewardModel([LogLikelihoodReward(p)]) for p in (far, local))
        nll = [r.rewards(of, r.score(of)).teacher_nll_BT(of.completion_mask_BT) for r in (ours, theirs)]
        torch.testing.assert_close(*nll, rtol=0, atol=1e-4)


def test_the_best_tokens_are_told_also_of_the_state_after_a_completion_that_was_cut_off():
    local = Teacher(model(), word_tokenizer())
    of = inputs()
    arguments = (PROMPTS, of.prompt_index_B, of.completion_ids_BT, of.completion_mask_BT, of.ended_B)
    with served(model(), word_tokenizer()) as loopback:
        ours = teacher_at(loopback).score(*arguments)
    theirs = local.score(*arguments)
    torch.testing.assert_close(ours.max, theirs.max - theirs.logsumexp, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ours.chosen, (theirs.chosen - theirs.logsumexp[:, :-1]) * of.completion_mask_BT, rtol=0, atol=1e-4
    )
    assert ours.mean is None


def test_ids_are_sent_in_few_requests_and_only_so_many_at_a_time():
    tokenizer = word_tokenizer()
    with served(model(), tokenizer) as loopback:
        client = CompletionsClient(loopback.url, tokenizer, concurrency=3)
        client.connect([EOS, EOS])
        asked, loopback.gathers = len(loopback.requests), 3
        texts = [[3 + i % 20, 4, 5] for i in range(60)]
        answers = client.read(texts)
        bodies = loopback.requests[asked:]
    assert len(bodies) == 8 and loopback.most_at_once == 3
    assert sorted(ids for body in bodies for ids in body["prompt"]) == sorted(texts)
    with torch.no_grad():
        logps = model()(torch.tensor(texts)).logits.log_softmax(dim=-1)
    expected = logps[:, :-1].gather(2, torch.tensor(texts)[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor([answer.chosen for answer in answers]), expected, rtol=0, atol=1e-4)


@pytest.mark.slow(2)
@pytest.mark.parametrize("code", [429, 500, 503])
def test_what_fails_for_a_while_is_asked_again(code):
    with served(model(), word_tokenizer(), fails=lambda body, number: code if number in (2, 3) else None) as loopback:
        client = teacher_at(loopback, patience=10.0).client
        assert len(client.read([[3, 4]])) == 1
        assert len(loopback.requests) == 4  # to connect, two failures, and the answer


@pytest.mark.slow(0.7)
def test_what_goes_on_failing_ends_and_says_why_without_the_key():
    """The server answers with the request's headers; so do its models, where a wrong key is given."""
    failing = {"fails": lambda body, number: 503 if number > 1 else None, "key": KEY}
    with served(model(), word_tokenizer(), **failing) as loopback:
        client = teacher_at(loopback, patience=1.2, api_key=KEY).client
        with pytest.raises(ServerError) as caught:
            client.read([[3, 4]] * 60)
        assert len(loopback.requests) <= 1 + 2 * 8  # eight at a time, each tried twice, before the others are given up
        message = str(caught.value)
        assert "has not answered in" in message and "503" in message and "Bearer ***" in message
        assert KEY not in message and KEY not in repr(caught.value.__cause__) and caught.value.__suppress_context__
        with pytest.raises(InputError, match="cannot be asked: 401") as caught:
            teacher_at(loopback, api_key=f"{KEY}x")
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "escape"),
    [
        ("sk-ab/cd+ef==", lambda text: text.replace("/", r"\/")),
        ("sk-ab/cd+ef==", lambda text: text.replace("+", r"\u002b")),
        ("sk-ab/cd+ef==", lambda text: quote(text, safe="")),
        ('sk-ab"cd&ef', lambda text: text),
        ("sk-ab&cd<ef", html.escape),
        ("sk-ab/cd+ef==", lambda text: text.replace("==", "…")),
    ],
)
def test_a_key_that_a_server_repeats_in_another_form_is_not_shown(key, escape):
    with (
        served(model(), word_tokenizer(), fails=lambda body, number: 403, escape=escape) as loopback,
        pytest.raises(InputError, match="403") as caught,
    ):
        teacher_at(loopback, api_key=key)
    assert "sk-ab" not in str(caught.value)


def test_a_model_is_not_called_by_the_key():
    with (
        served(model(), word_tokenizer(), names=(f"tiny-{KEY}",)) as loopback,
        pytest.raises(InputError, match="holds the API key: rename it") as caught,
    ):
        teacher_at(loopback, api_key=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_a_server_with_another_order_of_tokens_is_refused(dialect):
    """All ids of one are ids of the other: only their texts tell."""
    other = word_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["w20"], vocab["w21"] = vocab["w21"], vocab["w20"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    with (
        served(model(), other, dialect=dialect) as loopback,
        pytest.raises(InputError, match="read other tokens than were sent: 'w21' for id 20, which is 'w20'"),
    ):
        teacher_at(loopback)


def test_a_server_that_is_not_there_is_named_without_repeats():
    """The port is held, and nobody listens. Repeats would go on for two minutes."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url, began = f"http://127.0.0.1:{held.getsockname()[1]}", time.monotonic()
        with pytest.raises(InputError, match=r"cannot be asked: .*refused"):
            ServedTeacher(CompletionsClient(url, word_tokenizer()), word_tokenizer())
        assert time.monotonic() - began < 60


@pytest.mark.slow(1)
def test_a_request_has_its_time_also_where_the_server_trickles():
    """A byte every 0.2 s is never late for a socket, and the whole answer takes minutes."""
    with served(model(), word_tokenizer()) as loopback:
        client = teacher_at(loopback).client
        client.timeout = client.patience = 1.0
        loopback.trickle = 0.2
        began = time.monotonic()
        with pytest.raises(ServerError, match="no whole answer in 1 s"):
            client.read([[3, 4]])
        assert time.monotonic() - began < 20


def test_rewards_that_depend_on_the_mean_logit_are_refused():
    with served(model(), word_tokenizer()) as loopback:
        reward = TeacherForcingReward(teacher_at(loopback), gamma=0.9)
        with pytest.raises(InputError, match="of a single token depends on the teacher's mean logit"):
            reward.score_tokens(["w3"], [[5, EOS]])
        with pytest.raises(InputError, match=r"With gamma = 0\.9 the sum of teacher-forcing rewards depends on"):
            reward(["w3"], completion_ids=[[5, EOS]])
        sums = TeacherForcingReward(teacher_at(loopback))(["w3"] * 3, completion_ids=[[5, EOS], [6, 7], [EOS]])
    local = TeacherForcingReward(model(), word_tokenizer())(["w3"] * 3, completion_ids=[[5, EOS], [6, 7], [EOS]])
    differences = [ours - theirs for ours, theirs in zip(sums, local, strict=True)]
    assert differences == pytest.approx([differences[0]] * 3, abs=1e-4)


def test_a_run_goes_on_with_the_same_model_behind_the_name_only(tmp_path):
    """Its numbers may differ by what rounding makes of them."""
    records = {}
    for name, seed in {"same": 5, "again": 5, "other": 6}.items():
        with served(MODELS["llama"](seed=seed), word_tokenizer()) as loopback:
            records[name] = {"reward": {"teachers": [teacher_at(loopback).record()]}}
    records["again"]["reward"]["teachers"][0]["probe"][0] += 0.3
    (tmp_path / "run.json").write_text(json.dumps(records["same"]))
    check_same_run(tmp_path, records["again"])
    with pytest.raises(InputError, match=r'is of another run: teacher 1 was \{"served": "tiny"'):
        check_same_run(tmp_path, records["other"])


def other_token(answer: dict) -> dict:
    for choice in answer["choices"]:
        state = choice["prompt_logprobs"][-1]
        choice["prompt_logprobs"][-1] = {"77": next(iter(state.values()))}
    return answer


def cut(answer: dict) -> dict:
    for choice in answer["choices"]:
        choice["prompt_logprobs"] = choice["prompt_logprobs"][:-1]
    return answer


def other_echo(answer: dict) -> dict:
    for choice in answer["choices"]:
        choice["logprobs"]["tokens"][0] = "w26"
    return answer


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"change": other_token}, r"it has read other tokens than were sent: not 1, but \[77\]"),
        ({"change": cut}, "it has read 25 tokens, and 26 were sent"),
        ({"dialect": "echo", "change": other_echo}, "it has read other tokens than were sent: 'w26' for id 1"),
        ({"change": lambda answer: {"choices": []}}, "it answers 0 of 1 texts"),
        ({"change": lambda answer: {"text": "hello"}}, "has not the log-probabilities that were asked for"),
        ({"change": lambda answer: "<html>"}, "its answer is not JSON"),
        ({"fails": lambda body, number: 404 if body else None}, "With prompt_logprobs: 404"),
        ({"fails": lambda body, number: 302 if body else None}, "With prompt_logprobs: 302"),
        ({"names": ("a", "b")}, "has 2 models: name one of a, b"),
    ],
)
def test_a_server_that_does_not_tell_what_is_needed(behaviour, message):
    with served(model(), word_tokenizer(), **behaviour) as loopback, pytest.raises(InputError, match=message):
        teacher_at(loopback)


def test_what_needs_the_whole_distribution_is_refused():
    of = inputs()
    arguments = (PROMPTS, of.prompt_index_B, of.completion_ids_BT, of.completion_mask_BT, of.ended_B)
    with served(model(), word_tokenizer()) as loopback:
        teacher = teacher_at(loopback)
        with pytest.raises(InputError, match="V = 'expected' is a mean over the teacher's whole distribution"):
            teacher.score(*arguments, expected=True)
        with pytest.raises(InputError, match=r"V = 'soft' at tau = 2.0 needs the teacher's whole distribution"):
            teacher.score(*arguments, tau=2.0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host:8000", "holds a name, a password or parameters"),
        ("https://host/v1?key=secret", "holds a name, a password or parameters"),
        ("host:8000", "is no URL"),
        ("ftp://host", "is no URL"),
        ("http://host:many", "is no URL"),
    ],
)
def test_urls_that_are_none_or_hold_a_secret(url, message):
    with pytest.raises(InputError, match=message) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)


def test_urls_with_and_without_the_version():
    assert checked_url("http://host:8000/") == checked_url("http://host:8000/v1/") == "http://host:8000/v1"


@pytest.mark.parametrize("key", ["", "  ", "two\nlines", "schlüssel"])
def test_keys_that_no_header_can_have(key):
    with pytest.raises(InputError, match="API key is empty, or has characters that no header can have") as caught:
        CompletionsClient("http://host", word_tokenizer(), api_key=key)
    assert not key.strip() or key not in str(caught.value)


def test_after_a_signal_a_server_that_answers_slowly_is_waited_for(monkeypatch):
    """Six answers take 1.5 s, by a clock of their own, longer than the second after the signal without an answer."""
    monkeypatch.setattr(server_signals, "_SECONDS_AFTER_SIGNAL", 1.0)
    clock = [0.0]
    monkeypatch.setattr(server_signals, "monotonic", lambda: clock[0])
    signals = iter([signal.SIGTERM])

    def slowly(body: dict, number: int) -> None:
        if number > 1:  # the first request is that by which the server is tried out
            for once in signals:
                os.kill(os.getpid(), once)
            clock[0] += 0.25

    stop = StopRequest()
    with served(model(), word_tokenizer(), fails=slowly) as loopback:
        client = teacher_at(loopback, concurrency=1).client
        with stop.listening(is_last=True):
            try:
                assert len(client.read([[5, 6]] * 48)) == 48
            except Interrupted as stopped:  # which would end all tests
                pytest.fail(str(stopped))
        assert stop.signum == signal.SIGTERM and clock[0] == 1.5


def test_a_signal_that_came_before_is_obeyed_while_a_server_hangs(monkeypatch):
    monkeypatch.setattr(server_signals, "_SECONDS_AFTER_SIGNAL", 0.3)
    released = threading.Event()

    def hang(body: dict, number: int) -> None:
        if number > 1:
            released.wait(20)

    with served(model(), word_tokenizer(), fails=hang) as loopback:
        client = teacher_at(loopback, timeout=15.0, patience=15.0).client
        with StopRequest().listening(is_last=True):
            signal.raise_signal(signal.SIGTERM)  # while the student samples
            with pytest.raises(Interrupted) as stopped:
                client.read([[5, 6]])
        released.set()
    assert stopped.value.signum == signal.SIGTERM and not stopped.value.is_saved
