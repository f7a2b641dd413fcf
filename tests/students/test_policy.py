import copy
import math
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, T5Config

from rlkd_trl.errors import InputError
from rlkd_trl.models.generation import MixedWith
from rlkd_trl.models.precision import computes_in_float32
from rlkd_trl.models.rotary import angles_change_with_length
from rlkd_trl.students import Policy, frozen_copy
from tests.students.plain_forward import (
    ALLOWED,
    RAGGED,
    RaggedBatch,
    allowed_log_softmax,
    chosen_log_probs,
    entropies,
    plain_forward,
    plain_values,
)
from tests.tiny_models import EOS, MODELS, VOCAB, tiny_t5, word_tokenizer

# float32 forward passes of different batch shapes agree to a few units of 1e-6 on numbers up to about 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def t5_with_its_own_head(seed: int = 0):
    """transformers 5 builds every T5 tied, whatever its config says; only checkpoints with a head of their own, such
    as T0's and Flan-T5's, give an untied one."""
    model = tiny_t5(tied=False, seed=seed)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    return model


FAMILIES = {**MODELS, "t5-own-head": t5_with_its_own_head}


@pytest.fixture(params=list(FAMILIES))
def any_model(request):
    return FAMILIES[request.param]()


def policy_of(name: str, **kwargs) -> Policy:
    return Policy(FAMILIES[name](), word_tokenizer(), **kwargs)


def ragged_inputs(policy: Policy, **fillers):
    return RAGGED.tensors(policy.backbone.padding_side, **fillers)


def randomise_head(policy: Policy) -> None:
    torch.manual_seed(11)
    torch.nn.init.normal_(policy.value_head.weight)
    torch.nn.init.normal_(policy.value_head.bias)


def assert_rows(actual_BT, expected: list) -> None:
    """Each row against its own list, and exactly 0 behind it."""
    assert actual_BT.dtype == torch.float32
    for row, numbers in zip(actual_BT.detach(), expected, strict=True):
        torch.testing.assert_close(row[: len(numbers)].double(), numbers.detach(), **CLOSE)
        assert (row[len(numbers) :] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_those_of_the_models_own_logits(any_model, tokenizer, temperature):
    policy = Policy(any_model, tokenizer, temperature=temperature)
    output = policy(*ragged_inputs(policy))
    pairs = [(RAGGED.prompts[p], ids) for p, ids in zip(RAGGED.index, RAGGED.completions, strict=True)]
    assert_rows(output.logps_BT, [chosen_log_probs(any_model, *pair, temperature) for pair in pairs])
    assert_rows(output.entropy_BT, [entropies(any_model, *pair, temperature) for pair in pairs])
    assert output.values is None


@torch.no_grad()
def test_without_the_entropy_the_rest_stays(tokenizer):
    policy = policy_of("t5-untied", critic="shared")
    randomise_head(policy)
    whole, rest = (policy(*ragged_inputs(policy), with_entropy=wanted) for wanted in (True, False))
    assert rest.entropy_BT is None
    torch.testing.assert_close(rest.logps_BT, whole.logps_BT, rtol=0, atol=0)
    torch.testing.assert_close(rest.values, whole.values, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("critic", ["none", "shared"])
def test_a_function_of_states_reads_those_of_real_tokens(any_model, tokenizer, critic):
    """In the order of the mask, with the head that makes the model's own logits of them."""
    policy = Policy(any_model, tokenizer, critic=critic)
    read = {}

    def of_states(states_ND, head, parameters):
        read.update(logits=head(states_ND), parameters=parameters)
        return "what it returns"

    assert policy(*ragged_inputs(policy), function_of_states=of_states) == "what it returns"
    pairs = [(RAGGED.prompts[p], ids) for p, ids in zip(RAGGED.index, RAGGED.completions, strict=True)]
    expected = torch.cat([plain_forward(any_model, *pair)[0][: len(pair[1])] for pair in pairs])
    torch.testing.assert_close(read["logits"].double(), expected.double(), rtol=1e-4, atol=1e-4)
    assert [id(parameter) for parameter in read["parameters"]] == [id(any_model.get_output_embeddings().weight)]


def test_allowed_probabilities_add_up_to_one(any_model, tokenizer):
    """The distribution is over every id that may be sampled and nothing else."""
    policy = Policy(any_model, tokenizer, temperature=0.8)
    batch = RaggedBatch([[5, 9, EOS]], [0] * len(ALLOWED), [[v] for v in ALLOWED])
    total = policy(*batch.tensors(policy.backbone.padding_side)).logps_BT.detach().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)
    assert policy.forbidden_V.nonzero()[:, 0].tolist() == [v for v in range(VOCAB + 3) if v not in ALLOWED]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_every_sampled_token_has_a_gradient(any_model, tokenizer, position):
    """In TRL 0.11 the first token of an encoder-decoder completion had none."""
    policy = Policy(any_model, tokenizer)
    logps_BT = policy(*ragged_inputs(policy)).logps_BT
    parameters = [p for p in any_model.parameters() if p.requires_grad]
    ours = gradient(logps_BT[1, position], parameters)
    exact = copy.deepcopy(any_model).double()
    token = chosen_log_probs(exact, RAGGED.prompts[0], RAGGED.completions[1])[position]
    expected = gradient(token, [p for p in exact.parameters() if p.requires_grad])
    assert expected.norm() > 1
    # float32 rounds activations to a few millionths; norms that are fused here and not there change nothing of that.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def gradient(value, parameters) -> torch.Tensor:
    """One flat float64 tensor; 0 where the value does not depend on a parameter."""
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def test_samples_come_from_the_distribution_that_forward_returns(any_model, tokenizer):
    """Token by token from the model's own logits: the sample inverts the distribution function at the uniforms.

    Their log-probabilities come with them.
    """
    policy = Policy(any_model, tokenizer, temperature=0.7)
    prompt_ids, prompt_mask, _, _, _ = ragged_inputs(policy)
    index_B = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    uniforms_BT = torch.rand(9, 6, generator=torch.Generator().manual_seed(8))
    samples = policy.sample(prompt_ids, prompt_mask, index_B, max_completion_length=6, uniforms_BT=uniforms_BT)
    logps_BT = policy(prompt_ids, prompt_mask, index_B, samples.ids_BT, samples.mask_BT).logps_BT.detach()
    assert len({int(length) for length in samples.mask_BT.sum(dim=1)}) > 1, "the test needs ragged completions"

    for b, p in enumerate(index_B.tolist()):
        completion: list[int] = []
        for t in range(6):
            step_logps = allowed_log_softmax(
                plain_forward(any_model, RAGGED.prompts[p], completion)[0][-1].detach(), 0.7
            )
            cumulative = 0.0
            for v in ALLOWED:
                cumulative += math.exp(step_logps[v])
                if float(uniforms_BT[b, t]) < cumulative:
                    break
            completion.append(v)
            assert int(samples.ids_BT[b, t]) == v
            assert float(logps_BT[b, t]) == pytest.approx(float(step_logps[v]), abs=2e-5)
            assert float(samples.logps_BT[b, t]) == pytest.approx(float(step_logps[v]), abs=2e-5)
            if v == EOS:
                break
        assert samples.mask_BT[b].tolist() == [t < len(completion) for t in range(samples.mask_BT.shape[1])]
        assert bool(samples.ended_B[b]) == (completion[-1] == EOS)
    assert (samples.logps_BT[~samples.mask_BT] == 0).all() and samples.values_BT1 is None


@pytest.mark.parametrize("cap", [3, 12])
def test_values_of_a_shared_critic_come_with_the_samples(any_model, tokenizer, cap):
    """Of the states that the model's own forward pass gives, one completion at a time: one more where it is cut."""
    policy = Policy(any_model, tokenizer, temperature=0.7, critic="shared")
    randomise_head(policy)
    prompt_ids, prompt_mask, _, _, _ = ragged_inputs(policy)
    index_B = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    uniforms_BT = torch.rand(12, cap, generator=torch.Generator().manual_seed(8))
    samples = policy.sample(
        prompt_ids, prompt_mask, index_B, max_completion_length=cap, uniforms_BT=uniforms_BT, with_values=True
    )
    assert samples.ended_B.any() and (cap > 3 or not samples.ended_B.all()), "the test needs both"
    assert samples.values_BT1.shape == (12, samples.ids_BT.shape[1] + 1)
    for b, p in enumerate(index_B.tolist()):
        completion = samples.ids_BT[b][samples.mask_BT[b]].tolist()
        states = plain_forward(any_model, RAGGED.prompts[p], completion)[1]
        expected = policy.value_head(states)[:, 0].tolist()
        states_left = len(completion) + int(not samples.ended_B[b])
        got = samples.values_BT1[b].tolist()
        assert got[:states_left] == pytest.approx(expected[:states_left], abs=1e-4)
        assert got[states_left:] == [0.0] * (len(got) - states_left)


@pytest.mark.parametrize("critic", ["none", "separate"])
def test_values_of_another_critic_do_not_come_with_samples(critic, tokenizer):
    """A separate one's head on the student's states would give numbers that mean nothing."""
    policy = Policy(tiny_t5(tied=True), tokenizer, critic=critic)
    prompts = (*ragged_inputs(policy)[:2], torch.tensor([0]))
    with pytest.raises(InputError, match="a critic that shares the student's weights"):
        policy.sample(*prompts, max_completion_length=2, uniforms_BT=torch.rand(1, 2), with_values=True)


PRECISIONS = {
    "global": "torch.backends.fp32_precision = 'tf32'",
    "of products": "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "by the older function": "torch.set_float32_matmul_precision('high')",
    "exact": "torch.set_float32_matmul_precision('highest')",
}


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        *(("none", True), ("shared", True), ("separate", False), ("bfloat16", False), ("autocast", False)),
        ("quantised", False),
    ],
)
def test_when_sampling_tells_what_reading_would(change, tells, tokenizer):
    """In bfloat16 a token's log-probability depends on how many tokens are computed at a time."""
    model = tiny_t5(tied=True).to(torch.bfloat16 if change == "bfloat16" else torch.float32)
    model.is_quantized = change == "quantised"
    policy = Policy(model, tokenizer, critic=change if change in ("shared", "separate") else "none")
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert policy.samples_as_it_reads() == tells


def is_in_float32_after(statement: str) -> bool:
    exec(statement)
    return computes_in_float32(SimpleNamespace(dtype=torch.float32, device=torch.device("cpu")))


@pytest.mark.parametrize("name", PRECISIONS)
def test_tf32_however_it_is_set(name):
    """In a process of its own: torch refuses to read by one of its two interfaces what the other one has set."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(is_in_float32_after, (PRECISIONS[name],)) == (name == "exact")


@pytest.mark.parametrize(
    ("rotary", "tells"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "yarn", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "longrope"}}, False),
    ],
)
def test_angles_that_change_with_the_length(rotary, tells):
    config = LlamaConfig()
    config.rope_parameters = rotary
    assert angles_change_with_length(config) != tells
    config.rope_parameters = None
    assert not angles_change_with_length(config) and not angles_change_with_length(T5Config())


def test_where_angles_change_with_the_length_samples_are_read(tokenizer):
    """Beyond 16 positions of this model, its frequencies depend on how long the text is that one call reads."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rotary = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(
        vocab_size=VOCAB + 3, max_position_embeddings=16, rope_parameters=rotary, initializer_range=1.0, **shape
    )
    policy = Policy(LlamaForCausalLM(config), tokenizer)
    prompt = (torch.full((1, 6), 5), torch.ones(1, 6, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    uniforms_BT = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    policy.eos_ids = [-1]  # it goes on to the end
    samples = policy.sample(*prompt, max_completion_length=40, uniforms_BT=uniforms_BT)
    read_BT = policy(*prompt, samples.ids_BT, samples.mask_BT).logps_BT
    assert (samples.logps_BT - read_BT).abs().max() > 0.1, "the test needs a difference"
    assert not policy.samples_as_it_reads()


@pytest.mark.parametrize("top_k", [2, 5])
def test_top_k_samples_come_from_the_support_that_comes_with_them(any_model, tokenizer, top_k):
    """The k likeliest of the ids that may be sampled, renormalised; forward's log-probabilities are over them."""
    policy = Policy(any_model, tokenizer, temperature=0.7)
    prompt_ids, prompt_mask, _, _, _ = ragged_inputs(policy)
    index_B = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    uniforms_BT = torch.rand(9, 6, generator=torch.Generator().manual_seed(8))
    prompts = (prompt_ids, prompt_mask, index_B)
    samples = policy.sample(*prompts, max_completion_length=6, uniforms_BT=uniforms_BT, top_k=top_k)
    output = policy(*prompts, samples.ids_BT, samples.mask_BT, samples.support_BTk)
    assert samples.support_BTk.shape == (*samples.ids_BT.shape, top_k)

    for b, p in enumerate(index_B.tolist()):
        completion = samples.ids_BT[b][samples.mask_BT[b]].tolist()
        logits_TV = plain_forward(any_model, RAGGED.prompts[p], completion)[0].detach()
        for t, y in enumerate(completion):
            allowed = {v: float(logits_TV[t, v]) / 0.7 for v in ALLOWED}
            support = sorted(allowed, key=allowed.get, reverse=True)[:top_k]
            assert samples.support_BTk[b, t].tolist() == support
            total = math.fsum(math.exp(allowed[v]) for v in support)
            probabilities = [math.exp(allowed[v]) / total for v in support]
            # The inversion runs through the vocabulary in the order of the ids.
            cumulative = math.fsum(q for v, q in zip(support, probabilities, strict=True) if v < y)
            assert cumulative - 1e-5 < float(uniforms_BT[b, t]) < cumulative + probabilities[support.index(y)] + 1e-5
            logp = math.log(probabilities[support.index(y)])
            assert float(output.logps_BT[b, t]) == pytest.approx(logp, abs=1e-4)
            assert float(samples.logps_BT[b, t]) == pytest.approx(logp, abs=1e-4)
            entropy = -math.fsum(q * math.log(q) for q in probabilities)
            assert float(output.entropy_BT[b, t]) == pytest.approx(entropy, abs=1e-4)
    assert samples.mask_BT.sum() > 12


def test_a_mixture_of_nothing_but_the_teacher_samples_what_the_teacher_samples(any_model, tokenizer):
    """At the policy's temperature, each asked in its own way: the teacher gets the prompts in another order."""
    policy = Policy(any_model, tokenizer, temperature=0.7)
    teacher = Policy(tiny_t5(tied=False, seed=3), tokenizer, temperature=0.7)
    prompts, teachers_prompts = ragged_inputs(policy)[:2], ragged_inputs(teacher)[:2]
    index_B, teachers_index_B = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    settings = {
        "max_completion_length": 6,
        "uniforms_BT": torch.rand(3, 6, generator=torch.Generator().manual_seed(8)),
    }
    mixed_with = MixedWith(teacher.backbone, *teachers_prompts, teachers_index_B, weight=1.0)
    mixed = policy.sample(*prompts, index_B, mixed_with=mixed_with, **settings)
    assert torch.equal(mixed.ids_BT, teacher.sample(*teachers_prompts, teachers_index_B, **settings).ids_BT)
    assert not torch.equal(mixed.ids_BT, policy.sample(*prompts, index_B, **settings).ids_BT)


def test_sampled_frequencies_match_the_probabilities(any_model, tokenizer):
    policy = Policy(any_model, tokenizer, temperature=1.3)
    prompt_ids, prompt_mask, _, _, _ = ragged_inputs(policy)
    n = 20_000
    samples = policy.sample(
        prompt_ids[:1],
        prompt_mask[:1],
        torch.zeros(n, dtype=torch.long),
        max_completion_length=1,
        uniforms_BT=torch.rand(n, 1, generator=torch.Generator().manual_seed(0)),
    )
    counts = torch.bincount(samples.ids_BT[:, 0], minlength=VOCAB + 3).double() / n
    logits = plain_forward(any_model, RAGGED.prompts[0], [])[0][-1].detach()
    expected = allowed_log_softmax(logits, 1.3).exp()
    # 5 standard deviations of a share near ½ at n = 20,000: 5 · sqrt(0.25 / n) = 0.018
    assert (counts - expected).abs().max() < 0.018
    assert (counts[expected == 0] == 0).all()


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
def test_dropout_is_off_from_the_first_call_on(tokenizer, critic):
    """A model handed over in train mode, as `from_pretrained` never but a user's own training loop does."""
    model = tiny_t5(tied=True, dropout=0.5).train()
    policy = Policy(model, tokenizer, critic=critic)
    if critic != "none":
        randomise_head(policy)
    before = policy(*ragged_inputs(policy))
    policy.train()
    after = policy(*ragged_inputs(policy))
    torch.testing.assert_close(before.logps_BT, after.logps_BT, rtol=0, atol=0)
    if critic != "none":
        torch.testing.assert_close(before.values, after.values, rtol=0, atol=0)
    assert not any(module.training for module in policy.modules())
    expected = chosen_log_probs(tiny_t5(tied=True), RAGGED.prompts[0], RAGGED.completions[1])
    torch.testing.assert_close(after.logps_BT[1].double().detach(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_head_starts_at_zero_and_gets_a_gradient(any_model, tokenizer, critic):
    policy = Policy(any_model, tokenizer, critic=critic)
    values_BT1 = policy(*ragged_inputs(policy)).values
    assert values_BT1.shape == (5, 6) and values_BT1.dtype == torch.float32
    assert (values_BT1 == 0).all()
    (values_BT1 - 1).square().sum().backward()
    assert policy.value_head.weight.grad.norm() > 0.1
    assert policy.value_head.bias.grad.norm() > 0.1


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_the_head_on_the_models_own_states(any_model, tokenizer, critic):
    """At the state after the last token too, which a truncated completion is bootstrapped from."""
    policy = Policy(any_model, tokenizer, critic=critic)
    randomise_head(policy)
    values_BT1 = policy(*ragged_inputs(policy)).values.detach()
    for row, p, ids in zip(values_BT1, RAGGED.index, RAGGED.completions, strict=True):
        expected = plain_values(any_model, policy.value_head, RAGGED.prompts[p], ids).detach()
        torch.testing.assert_close(row[: len(ids) + 1].double(), expected, **CLOSE)


def test_log_probs_take_the_memory_of_the_logits(any_model, tokenizer):
    """So that a second backward pass is refused."""
    policy = Policy(any_model, tokenizer)
    logps_BT = policy(*ragged_inputs(policy)).logps_BT
    logps_BT.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        logps_BT.sum().backward()


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
def test_without_the_final_value_all_else_is_the_same(any_model, tokenizer, critic):
    policy = Policy(any_model, tokenizer, critic=critic)
    if critic != "none":
        randomise_head(policy)
    whole = policy(*ragged_inputs(policy))
    without = policy(*ragged_inputs(policy), with_final_value=False)
    torch.testing.assert_close(without.logps_BT, whole.logps_BT, **CLOSE)
    torch.testing.assert_close(without.entropy_BT, whole.entropy_BT, **CLOSE)
    if critic == "none":
        assert without.values is whole.values is None
    else:
        assert without.values.shape == (5, 5)
        torch.testing.assert_close(without.values, whole.values[:, :-1], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_critic_trains_the_trunk_and_a_separate_one_leaves_it_alone(name):
    for critic in ("shared", "separate"):
        policy = policy_of(name, critic=critic)
        randomise_head(policy)
        policy(*ragged_inputs(policy)).values.square().sum().backward()
        trunk = [p.grad for p in policy.model.parameters() if p.grad is not None]
        if critic == "shared":
            assert sum(float(g.norm()) for g in trunk) > 0.1
        else:
            assert all((g == 0).all() for g in trunk)
            assert sum(float(p.grad.norm()) for p in policy.critic_model.parameters() if p.grad is not None) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_separate_critic_has_weights_of_its_own(name):
    policy = policy_of(name, critic="separate")
    own = {p.data_ptr() for p in policy.model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in policy.critic_model.parameters())
    policy(*ragged_inputs(policy)).logps_BT.sum().backward()
    assert all(p.grad is None for p in policy.critic_model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_unused_critic_parameters_are_frozen(name):
    """A trainable parameter without a gradient would make distributed gradient reduction wait for it."""
    policy = policy_of(name, critic="separate")
    randomise_head(policy)
    output = policy(*ragged_inputs(policy))
    (output.logps_BT.sum() + output.values.sum()).backward()
    assert [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_garbage_behind_the_masks_changes_nothing(name):
    results = []
    for prompt_filler, completion_filler in ((0, 0), (17, 23), (VOCAB + 2, EOS), (0, VOCAB - 1)):
        policy = policy_of(name, critic="shared")
        randomise_head(policy)
        output = policy(*ragged_inputs(policy, prompt_filler=prompt_filler, completion_filler=completion_filler))
        real_BT1 = torch.tensor([[t <= len(ids) for t in range(6)] for ids in RAGGED.completions])
        values = output.values[real_BT1]
        (output.logps_BT.sum() + 0.3 * output.entropy_BT.sum() + values.square().sum()).backward()
        gradients = {n: p.grad for n, p in policy.named_parameters()}
        results.append((output.logps_BT, output.entropy_BT, values, gradients))
    clean = results[0]
    for poisoned in results[1:]:
        for expected, actual in zip(clean[:3], poisoned[:3], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert clean[3].keys() == poisoned[3].keys()
        for parameter, gradient in clean[3].items():
            torch.testing.assert_close(poisoned[3][parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_loads_what_is_saved(name, critic, tmp_path):
    policy = policy_of(name, critic=critic)
    with torch.no_grad():  # away from any default initialisation
        for parameter in policy.model.parameters():
            parameter.add_(0.05)
    if critic != "none":
        randomise_head(policy)
    policy.save_pretrained(tmp_path)
    auto_class = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert all(not keys for keys in info.values()), f"unexpected loading info: {info}"
    assert type(loaded) is type(policy.model)
    ours = plain_forward(policy.model, RAGGED.prompts[0], RAGGED.completions[1])[0]
    theirs = plain_forward(loaded.eval(), RAGGED.prompts[0], RAGGED.completions[1])[0]
    torch.testing.assert_close(loaded.state_dict(), policy.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # our GELU is fused, and rounds in its own way


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_load_pretrained_restores_model_and_critic(name, critic, tmp_path):
    policy = policy_of(name, critic=critic)
    if critic != "none":
        randomise_head(policy)
    if critic == "separate":
        with torch.no_grad():  # a critic that has moved away from the student
            for parameter in policy.critic_model.parameters():
                parameter.mul_(1.1)
    policy.save_pretrained(tmp_path)
    other = Policy(FAMILIES[name](seed=9), word_tokenizer(), critic=critic)
    tied = other.model.get_input_embeddings().weight is other.model.get_output_embeddings().weight
    other.load_pretrained(tmp_path)
    expected, actual = policy(*ragged_inputs(policy)), other(*ragged_inputs(other))
    torch.testing.assert_close(actual.logps_BT, expected.logps_BT, rtol=0, atol=0)
    if critic != "none":
        torch.testing.assert_close(actual.values, expected.values, rtol=0, atol=0)
    assert (other.model.get_input_embeddings().weight is other.model.get_output_embeddings().weight) == tied
    assert tied == (name == "t5-tied")


def test_frozen_copy_stays_as_it_was(any_model, tokenizer):
    policy = Policy(any_model, tokenizer, temperature=0.7, critic="shared")
    reference = frozen_copy(policy, tokenizer)
    before = reference(*ragged_inputs(policy)).logps_BT
    with torch.no_grad():
        # The policy reads one token more, for its critic, and products of other shapes may round otherwise.
        torch.testing.assert_close(before, policy(*ragged_inputs(policy)).logps_BT, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    policy(*ragged_inputs(policy)).logps_BT.sum().backward()
    optimizer.step()
    assert (policy(*ragged_inputs(policy)).logps_BT - before).abs().max() > 0.1
    torch.testing.assert_close(reference(*ragged_inputs(policy)).logps_BT, before, rtol=0, atol=0)
    assert not before.requires_grad
    assert not any(p.requires_grad for p in reference.parameters())
    assert reference.value_head is None
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_bfloat16_model_gives_float32_statistics(any_model, tokenizer, critic):
    expected = Policy(copy.deepcopy(any_model), tokenizer)(*RAGGED.tensors(_side(any_model)))
    policy = Policy(any_model.to(torch.bfloat16), tokenizer, critic=critic)
    output = policy(*ragged_inputs(policy))
    assert {tensor.dtype for tensor in output} == {torch.float32}
    assert policy.value_head.weight.dtype == torch.float32
    # bfloat16 has 8 bits: logits up to about 5 are off by 0.02 a layer.
    torch.testing.assert_close(output.logps_BT, expected.logps_BT, rtol=0.1, atol=0.15)
    # Statistics taken in bfloat16 would be multiples of 2^-7 at this size; these are not.
    real = output.logps_BT[output.logps_BT != 0]
    assert (real != real.to(torch.bfloat16).float()).any()


def _side(model) -> str:
    return "right" if model.config.is_encoder_decoder else "left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"critic": "both"}, "critic"), ({"temperature": 0.0}, "temperature"), ({"temperature": -1.0}, "temperature")],
)
def test_bad_arguments(tokenizer, arguments, message):
    with pytest.raises(InputError, match=message):
        Policy(tiny_t5(tied=True), tokenizer, **arguments)


def test_no_eos_is_an_error(tokenizer):
    model = tiny_t5(tied=True)
    model.generation_config.eos_token_id = None
    without_eos = word_tokenizer(append_eos=False)
    without_eos.eos_token = None
    with pytest.raises(InputError, match="EOS"):
        Policy(model, without_eos)
