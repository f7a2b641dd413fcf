"""Prompts in chat templates: what a model reads is what transformers' `apply_chat_template` makes of them."""

import time

import pytest
from tokenizers.processors import TemplateProcessing

from rlkd_trl.errors import InputError
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.prompts import check_can_fit, prompt_lengths, prompt_token_ids, shorten
from rlkd_trl.models.vocabulary import eos_token_ids, forbidden_ids
from rlkd_trl.prompts import ChatFormat, PromptTemplate, source_text
from tests.tiny_models import CHAT_TEMPLATE, END, EOS, PADDED_VOCAB, chat_tokenizer, tiny_llama, word_tokenizer

END_ID = 26
TALK = [
    {"role": "system", "content": "w3"},
    {"role": "user", "content": "w4 w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "w7"},
]
CONTINUED = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6"}]


def ids_read(writer: PromptWriter, prompt, max_length: int | None = None) -> list[int]:
    [ids] = prompt_token_ids(writer.processing_class, [writer.text(prompt)], max_length=max_length)
    return ids


def applied(tokenizer, messages, **kwargs) -> list[int]:
    """transformers' own ids."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)["input_ids"]


def said(text: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


# What is read


def test_a_text_is_what_the_user_says_and_a_conversation_what_was_said():
    tokenizer = chat_tokenizer()
    writer = PromptWriter(tokenizer)
    assert ids_read(writer, "w4 w5") == applied(tokenizer, said("w4 w5")) == [23, 4, 5, 26, 24]
    assert ids_read(writer, TALK) == applied(tokenizer, TALK) == [25, 3, 26, 23, 4, 5, 26, 24, 6, 26, 23, 7, 26, 24]
    rendered = PromptTemplate("t", "w9 {{ s }}").render({"s": "w4"})
    assert ids_read(writer, rendered) == applied(tokenizer, said("w9 w4"))


def test_what_the_assistant_has_begun_to_say_goes_on():
    """As TRL has it: the turn stays open, and no new one is opened."""
    tokenizer = chat_tokenizer()
    expected = tokenizer.apply_chat_template(CONTINUED, continue_final_message=True)["input_ids"]
    assert ids_read(PromptWriter(tokenizer), CONTINUED) == expected == [23, 4, 26, 24, 5, 6]


def test_batches_may_hold_both_kinds():
    writer = PromptWriter(chat_tokenizer())
    texts = [*writer.texts(["w4", TALK]), "w9 w10"]
    assert prompt_token_ids(writer.processing_class, texts) == [
        ids_read(writer, "w4"),
        ids_read(writer, TALK),
        [9, 10],
    ]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("max_length", [None, 4, 5])
def test_bos_is_as_the_chat_template_writes_it(adds_bos, writes_bos, max_length):
    """Whatever the tokenizer itself would add, before a text and behind it."""
    tokenizer = chat_tokenizer(("{{ bos_token }} " if writes_bos else "") + CHAT_TEMPLATE)
    tokenizer.bos_token = "w3"
    if adds_bos:
        post = TemplateProcessing(single="w3 $A </s>", special_tokens=[("w3", 3), ("</s>", EOS)])
        tokenizer.backend_tokenizer.post_processor = post
    expected = applied(tokenizer, said("w4"))
    assert expected == [3] * writes_bos + [23, 4, 26, 24]
    if max_length is None or len(expected) <= max_length:
        assert ids_read(PromptWriter(tokenizer), "w4", max_length) == expected
    else:
        with pytest.raises(InputError, match="cannot be cut to 4"):
            ids_read(PromptWriter(tokenizer), "w4", max_length)


def test_a_text_with_the_templates_own_markers_is_left_alone():
    """By hand, or with TRL's `apply_chat_template`: it ends as the template opens the assistant's turn."""
    writer = PromptWriter(chat_tokenizer())
    by_hand = "w25 w9 w26 w23 w4 w26 w24"
    assert ids_read(writer, by_hand) == [25, 9, 26, 23, 4, 26, 24]
    assert ids_read(writer, f"{by_hand}\n") == ids_read(writer, by_hand)
    written = writer.text("w4")
    assert writer.text(written) is written
    # Something of it is not enough.
    assert ids_read(writer, "w23 w4") == [23, 23, 4, 26, 24]
    # Where a line ends may be written in several ways; the variables of the template need not be those of the text.
    turns = (
        "{% for m in messages %}w23 {{ m.content }} w26\n{% endfor %}{% if add_generation_prompt %}w24\n{% endif %}"
    )
    hurried = turns.replace("w24", "w24{% if hurry %} w25{% endif %}")
    for template, kwargs in ((turns, None), (hurried, {"hurry": True})):
        writer = PromptWriter(chat_tokenizer(template), ChatFormat(template_kwargs=kwargs))
        for text in ("w23 w4 w26\nw24\n", "w23 w4 w26 w24"):
            assert writer.text(text) == text
    # And where no special token shows it, nobody can know.
    plain = PromptWriter(chat_tokenizer("{% for m in messages %}{{ m.content }} w9{% endfor %}"))
    assert ids_read(plain, "w4 w9") == [4, 9, 9]


def test_without_a_chat_template_nothing_changes():
    tokenizer = word_tokenizer()
    writer = PromptWriter(tokenizer)
    rendered = PromptTemplate("t", "w9 {{ s }}").render({"s": "w4"})
    for prompt in ("w4 w5", rendered):
        assert writer.text(prompt) is prompt
    assert writer.processing_class is tokenizer
    assert (writer.is_chat, writer.record()) == (False, None)
    assert ids_read(writer, "w4") == [4, EOS]
    with pytest.raises(InputError, match="a conversation, and the tokenizer has no chat template"):
        writer.text(TALK)


def test_a_chat_template_can_be_turned_off_or_exchanged(tmp_path):
    tokenizer = chat_tokenizer()
    off = PromptWriter(tokenizer, ChatFormat("none"))
    assert ids_read(off, "w4 w5") == [4, 5]
    assert off.processing_class.chat_template is None
    assert off.processing_class.eos_token == "</s>"
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}w9 {{ m.content }} w26 {% endfor %}w10")
    exchanged = PromptWriter(tokenizer, ChatFormat(str(file)))
    assert ids_read(exchanged, "w4") == [9, 4, 26, 10]
    assert exchanged.processing_class.chat_template == file.read_text()
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    tiny_llama().config.save_pretrained(tmp_path / "checkpoint")
    base = word_tokenizer(append_eos=False)
    of_checkpoint = PromptWriter(base, ChatFormat(str(tmp_path / "checkpoint")))
    assert ids_read(of_checkpoint, "w4") == [23, 4, 26, 24]
    # Who gave the tokenizers keeps them.
    assert (tokenizer.chat_template, base.chat_template) == (CHAT_TEMPLATE, None)
    word_tokenizer().save_pretrained(tmp_path / "base")
    tiny_llama().config.save_pretrained(tmp_path / "base")
    for missing in (tmp_path / "base", tmp_path / "none.jinja"):
        with pytest.raises(InputError, match=str(missing)):
            PromptWriter(tokenizer, ChatFormat(str(missing)))


def test_variables_reach_the_template():
    template = CHAT_TEMPLATE.replace("w24 {% endif", "w24 {{ 'w9' if thinks else 'w10' }} {% endif")
    tokenizer = chat_tokenizer(template)
    for thinks, word in ((True, 9), (False, 10)):
        writer = PromptWriter(tokenizer, ChatFormat(template_kwargs={"thinks": thinks}))
        assert ids_read(writer, "w4") == applied(tokenizer, said("w4"), thinks=thinks) == [23, 4, 26, 24, word]


def test_an_opening_may_hold_any_character():
    template = "{% for m in messages %}w23 {{ m.role }} \"'\\\n {{ m.content }} w26 {% endfor %}"
    writer = PromptWriter(chat_tokenizer({"default": template, "other": "{{ 1 }}"}))
    assert writer.text("w4") == "w23 user \"'\\\n w4 w26 w23 assistant \"'\\\n"
    assert writer.processing_class.chat_template["other"] == "{{ 1 }}"


def test_of_several_templates_the_default_is_used():
    named = {"default": CHAT_TEMPLATE, "tool_use": "w9"}
    assert ids_read(PromptWriter(chat_tokenizer(named)), "w4") == [23, 4, 26, 24]
    with pytest.raises(InputError, match=r"multiple chat templates.*\['rag', 'tool_use'\]"):
        PromptWriter(chat_tokenizer({"rag": CHAT_TEMPLATE, "tool_use": "w9"}))


# The system prompt


def test_the_system_prompt_goes_first_unless_the_data_has_its_own():
    tokenizer = chat_tokenizer()
    writer = PromptWriter(tokenizer, ChatFormat(system_prompt="w9 w10"))
    assert ids_read(writer, "w4") == applied(tokenizer, said("w4", "w9 w10"))
    assert ids_read(writer, CONTINUED) == [25, 9, 10, 26, 23, 4, 26, 24, 5, 6]
    assert ids_read(writer, TALK) == applied(tokenizer, TALK)
    later = [{"role": "user", "content": "w4"}, {"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}]
    assert ids_read(writer, later) == applied(tokenizer, later), "its own need not be the first message"


def test_a_text_that_gets_its_markers_twice_is_warned_of_once(caplog):
    writer = PromptWriter(chat_tokenizer())
    with caplog.at_level("WARNING", logger="rlkd_trl.models.chat"):
        writer.texts(["w4 w26", "w23 w4 w26 w24 w5", "w23 w4"])
    assert [record.getMessage() for record in caplog.records] == [
        "A prompt holds 'w23', by which the chat template of the tokenizer opens the user's turn, and does not end as "
        "that opens the assistant's: it is taken for what the user says, and gets the markers once more. If it was "
        "written for the model already, turn the chat template off ('none')."
    ]


@pytest.mark.parametrize("is_asked_in_a_chat", [True, False])
def test_a_template_without_a_generation_prompt_gets_the_words_that_open_an_answer(is_asked_in_a_chat):
    """Those between what the user says and the answer to it; what the assistant has begun to say is gone on from."""
    template = CHAT_TEMPLATE.split("{%- if add_generation_prompt")[0]
    tokenizer = chat_tokenizer(template)
    writer = PromptWriter(tokenizer)
    question = "w4" if is_asked_in_a_chat else said("w4", system="w9")
    system = [] if is_asked_in_a_chat else [25, 9, 26]
    assert tokenizer.apply_chat_template(said("w4"), add_generation_prompt=True)["input_ids"] == [23, 4, 26]
    assert ids_read(writer, question) == [*system, 23, 4, 26, 24]
    assert ids_read(writer, CONTINUED) == [23, 4, 26, 24, 5, 6]
    assert ids_read(writer, "w23 w4 w26 w24") == [23, 4, 26, 24]
    assert ids_read(writer, "w23 w4 w26") == [23, 4, 26, 24], "what `apply_chat_template` wrote without it"
    # What is saved writes it, and is read as it is.
    saved = writer.processing_class
    assert applied(saved, said("w4")) == ids_read(writer, said("w4")) == [23, 4, 26, 24]
    again = PromptWriter(saved)
    assert again.processing_class is saved and again.record() == writer.record()
    assert tokenizer.chat_template == template, "the tokenizer that was given is not changed"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}w23 {{ m.content }} w26 {% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}w23 {{ m.content }} w26{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        # The answer in whose place this would stand has been thought about; one that is to come is not yet.
        CHAT_TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'assistant' %}w9 w9 {% endif %}{{ m.content }}"),
    ],
)
def test_one_that_needs_no_such_words_gets_none(template):
    tokenizer = chat_tokenizer(template)
    assert ids_read(PromptWriter(tokenizer), "w4 w5") == applied(tokenizer, said("w4 w5"))


ALTERNATING = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('The first message must be of the system') }}{% endif %}"
    + CHAT_TEMPLATE
)


def test_a_template_that_wants_a_system_message_gets_it_from_the_prompt_or_the_data():
    tokenizer = chat_tokenizer(ALTERNATING)
    assert ids_read(PromptWriter(tokenizer, ChatFormat(system_prompt="w9")), "w4") == applied(
        tokenizer, said("w4", "w9")
    )
    writer = PromptWriter(tokenizer)
    assert ids_read(writer, TALK) == applied(tokenizer, TALK)
    assert writer.processing_class.eos_token == END
    with pytest.raises(InputError, match="The first message must be of the system"):
        writer.text("w4")


ONLY_TWO_ROLES = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}w25 {{ messages[0].content }} w26 {% endif %}" + ONLY_TWO_ROLES


@pytest.mark.parametrize(
    ("template", "roles", "left_out"),
    [
        (ONLY_TWO_ROLES, "system user", 1),
        (FIRST_SYSTEM, "system user", None),
        (FIRST_SYSTEM, "system user system user", 3),
        (FIRST_SYSTEM, "user tool", 2),
        (CHAT_TEMPLATE, "user assistant user", None),
    ],
)
def test_a_message_that_the_template_leaves_out_is_an_error(template, roles, left_out):
    """Whatever its words are, and though others may have been read before."""
    writer = PromptWriter(chat_tokenizer(template))
    writer.text(said("w4"))
    talk = [{"role": role, "content": f"w{4 + n}"} for n, role in enumerate(roles.split())]
    for _ in range(2):
        if left_out is None:
            assert all(message["content"] in writer.text(talk).split() for message in talk)
        else:
            role = roles.split()[left_out - 1]
            with pytest.raises(InputError, match=f"leaves out message {left_out} of a conversation, what the {role}"):
                writer.text(talk)


# As Llama 3.1's: a call of a tool is shown in place of the words beside it.
OF_TOOLS = CHAT_TEMPLATE.replace(
    "{{ m.content }}", "{{ m.tool_calls[0].name if m.tool_calls else m.content }}"
).replace("'system': 'w25'", "'system': 'w25', 'tool': 'w22'")
CALL = [{"name": "w8"}]


@pytest.mark.parametrize("words", [{}, {"content": ""}, {"content": "w9"}])
def test_calls_of_tools_are_shown_as_the_template_has_it(words):
    talk = [*said("w4"), {"role": "assistant", "tool_calls": CALL, **words}, {"role": "tool", "content": "w5"}]
    writer = PromptWriter(chat_tokenizer(OF_TOOLS))
    assert ids_read(writer, talk) == applied(writer.processing_class, talk)


def test_what_was_read_of_some_messages_is_not_taken_for_others():
    """Here only a tool's last message is shown; the roles are alike."""
    template = OF_TOOLS.replace("{%- for m in messages -%}", "{%- for m in messages if m.tool_calls or not m.id -%}")
    writer = PromptWriter(chat_tokenizer(template))
    fine = [*said("w4"), {"role": "assistant", "content": "", "tool_calls": CALL}, *said("w6")]
    assert ids_read(writer, fine) == applied(writer.processing_class, fine)
    other = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w9"}, *said("w6")]
    assert ids_read(writer, other) == applied(writer.processing_class, other)
    nowhere = CHAT_TEMPLATE.replace(
        "for m in messages", "for m in messages if m.content != '' and m.role != 'assistant'"
    )
    writer = PromptWriter(chat_tokenizer(nowhere.replace("{%- endfor", "{%- endfor")))
    assert writer.text([*said("w4"), {"role": "assistant", "content": ""}, *said("w6")])
    with pytest.raises(InputError, match="leaves out message 2"):
        writer.text(other)


def test_a_system_prompt_that_a_continued_conversation_would_lose_is_an_error():
    """As with Mistral's, which shows it before the user's last message only where that ends the conversation."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if loop.last and m.role == 'user' and messages[0].role == "
        "'system' %}{{ messages[0].content }} {% endif %}w23 {{ m.content }} {% endfor %}"
    )
    writer = PromptWriter(chat_tokenizer(template), ChatFormat(system_prompt="w9"))
    assert "w9" in writer.text("w4")
    with pytest.raises(InputError, match="leaves out message 1 of a conversation, what the system says"):
        writer.text(CONTINUED)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SILENT = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM + CHAT_TEMPLATE, "refuses a conversation: System role not supported. Leave the system prompt out"),
        (SILENT, "leaves out what the system says. Leave the system prompt out"),
        (None, "system prompt for a chat template was given ('w9'), and the tokenizer has none"),
    ],
)
def test_a_model_that_takes_no_system_prompt_says_so_at_once(template, message):
    tokenizer = chat_tokenizer(template)
    with pytest.raises(InputError) as error:
        PromptWriter(tokenizer, ChatFormat(system_prompt="w9"))
    assert message in str(error.value)
    assert ids_read(PromptWriter(tokenizer), "w4")[-2:] == ([END_ID, 24] if template else [4])


def test_a_system_message_in_the_data_is_refused_as_well():
    writer = PromptWriter(chat_tokenizer(NO_SYSTEM + CHAT_TEMPLATE))
    with pytest.raises(InputError, match="refuses a conversation: System role not supported"):
        writer.text(TALK)


def test_a_system_prompt_with_the_template_off_is_a_contradiction():
    with pytest.raises(InputError, match=r"was given .*, and it is turned off"):
        PromptWriter(chat_tokenizer(), ChatFormat("none", system_prompt="w9"))


# The end of a turn


def test_the_end_of_a_turn_ends_completions_and_targets():
    tokenizer, model = chat_tokenizer(), tiny_llama()
    changed = PromptWriter(tokenizer).processing_class
    assert (changed.eos_token, tokenizer.eos_token) == (END, "</s>")
    assert eos_token_ids(model, changed) == [EOS, END_ID]  # its generation config's, and the turn's
    assert eos_token_ids(model, word_tokenizer()) == [EOS]
    forbidden_V = forbidden_ids(changed, PADDED_VOCAB, eos_token_ids(model, changed))
    assert forbidden_V[[23, 24, 25, 26]].tolist() == [True, True, True, False]


def test_a_tokenizer_whose_eos_ends_the_turn_is_kept():
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = END
    assert PromptWriter(tokenizer).processing_class is tokenizer


def test_the_users_next_turn_ends_one_that_nothing_else_does():
    """As GLM's: <|user|> is what the model writes when it has done."""
    tokenizer = chat_tokenizer(CHAT_TEMPLATE.replace(" w26", ""))
    assert PromptWriter(tokenizer).processing_class.eos_token == "w23"


def test_a_template_without_special_tokens_leaves_the_eos():
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    writer = PromptWriter(tokenizer)
    assert writer.processing_class is tokenizer
    assert ids_read(writer, "w4") == [23, 4, 26, 24]


# Prompts that are too long


def long(first: int, count: int) -> str:
    return " ".join(f"w{3 + (first + i) % 20}" for i in range(count))


@pytest.mark.parametrize("system", [None, "w9 w10 w11 w12"])
@pytest.mark.parametrize("room", [1, 2, 5, 30])
def test_a_cap_cuts_what_the_user_says_and_not_the_templates_words(room, system):
    tokenizer = chat_tokenizer()
    writer = PromptWriter(tokenizer, ChatFormat(system_prompt=system))
    whole = long(0, 30)
    max_length = len(applied(tokenizer, said("", system))) + room
    expected = applied(tokenizer, said(long(0, room), system))
    assert len(expected) == max_length
    assert ids_read(writer, whole, max_length) == expected
    document = PromptTemplate("t", "w3 {{ s }} w4").render({"s": whole})
    if room > 2:
        found = ids_read(writer, document, max_length)
        assert found == applied(tokenizer, said(f"w3 {long(0, room - 2)} w4", system))
        # What a data set keeps is the question, without the chat.
        kept = shorten(tokenizer, document, max_length, read_as=writer.text)
        assert kept == f"w3 {long(0, room - 2)} w4"
        assert ids_read(writer, kept, max_length) == found


def test_of_a_conversation_the_longest_turns_are_cut_and_the_systems_is_not():
    tokenizer = chat_tokenizer()
    talk = [*said(long(0, 30), system=long(5, 8)), {"role": "assistant", "content": "w3"}, *said(long(9, 30))]
    cut = [*said(long(0, 4), system=long(5, 8)), {"role": "assistant", "content": "w3"}, *said(long(9, 4))]
    expected = applied(tokenizer, cut)
    writer = PromptWriter(tokenizer)
    assert ids_read(writer, talk, len(expected)) == expected
    text = writer.text(talk)
    check_can_fit(writer.processing_class, text, len(applied(tokenizer, cut)) - 6)  # one token of each
    with pytest.raises(InputError, match=f"A prompt of {prompt_lengths(tokenizer, [text])[0]} tokens cannot be cut"):
        check_can_fit(writer.processing_class, text, len(applied(tokenizer, cut)) - 7)


def test_what_the_assistant_has_begun_to_say_is_not_cut():
    writer = PromptWriter(chat_tokenizer())
    begun = [*said(long(0, 30)), {"role": "assistant", "content": long(5, 8)}]
    cut = [*said(long(0, 4)), begun[1]]
    expected = writer.processing_class.apply_chat_template(cut, continue_final_message=True)["input_ids"]
    assert ids_read(writer, begun, len(expected)) == expected
    with pytest.raises(InputError, match="cannot be cut to 6"):
        ids_read(writer, begun, 6)


# Templates and messages that are not good

BAD_MESSAGES = {
    "no role": ([{"content": "w3"}], "Message 1 of a conversation has no role"),
    "no content": ([{"role": "user"}], "Message 1 of a conversation, of role 'user', has the content None"),
    "an image": ([*CONTINUED, {"role": "user", "content": [{"type": "image"}]}], "Message 3 .* not a text"),
}


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_conversation_is_refused_in_words(messages, message):
    with pytest.raises(InputError, match=message):
        PromptWriter(chat_tokenizer()).text(messages)


def test_content_in_blocks_of_text_is_their_text():
    writer = PromptWriter(chat_tokenizer())
    blocks = [{"type": "text", "text": "w4 "}, {"type": "text", "text": "w5", "image": None}]
    assert writer.text([{"role": "user", "content": blocks}]) == writer.text(said("w4 w5"))
    assert source_text([{"role": "user", "content": blocks}]) == "w4 w5"
    with pytest.raises(InputError, match="not a text: models here read texts only"):
        writer.text([{"role": "user", "content": [*blocks, {"type": "image"}]}])


def test_keys_without_a_value_are_left_out():
    """A data set fills them in where another row has one."""
    template = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ ' w9' if 'name' in m }}")
    messages = [{"role": "user", "content": "w4", "name": None}]
    assert ids_read(PromptWriter(chat_tokenizer(template)), messages) == [23, 4, 26, 24]


HOSTILE = {
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "s of CPU time"),
    "a power": ("{{ 9**(9**9) }}", "s of CPU time"),
    # At once: what grows to the bound by doubling takes up to a second where memory is slow, and ends by that bound.
    "memory": ("{{ 'a'|center(10**10) }}", "MiB of memory"),
    "much output": ("{% for a in range(99999) %}{{ 'ab' * 999 }}{% endfor %}", "more than 10000000 characters"),
    "internals": ("{{ messages.__class__.__mro__ }}", "sandbox"),
    "not jinja": ("{% for %}", "is not valid jinja, line 1"),
    "silent": ("w3", "leaves out what the user says"),
}


@pytest.mark.slow(0.5)
@pytest.mark.parametrize(("template", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_chat_template_ends_soon_and_the_next_one_renders(template, message):
    """A tokenizer's directory may come from anywhere."""
    began = time.process_time()
    with pytest.raises(InputError, match=message):
        PromptWriter(chat_tokenizer(template))
    assert time.process_time() - began < 1, "nothing of it may run in this process"
    assert ids_read(PromptWriter(chat_tokenizer()), "w4") == [23, 4, 26, 24]


@pytest.mark.slow(2)
def test_a_template_that_is_hostile_to_one_prompt_only():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    writer = PromptWriter(
        chat_tokenizer("{% if 'w9' in messages[0].content %}" + loops + "{% endif %}" + CHAT_TEMPLATE)
    )
    with pytest.raises(InputError, match="takes more than 1 s of CPU time for one prompt"):
        writer.text("w9")
    assert ids_read(writer, "w4") == [23, 4, 26, 24]
