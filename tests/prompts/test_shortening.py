"""Too long a prompt loses the end of its longest documents, and none of its template's words."""

import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates, can_fit, shortened

PROMPTSOURCE = Path(__file__).parents[3] / "shared/data/promptsource"
BUILTIN = ["data_to_text", "dialogue", "paraphrase", "summarisation"]


def count(text: str) -> int:
    """A tokenizer for these tests: every word is a token, and so is an end of sequence."""
    return len(text.split()) + 1


def ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\S+", text)]


def shorten(jinja: str, cap: int, **row: object) -> str:
    prompt = PromptTemplate("t", jinja).render(row)
    assert count(prompt) > cap
    return shortened(prompt, count_tokens=count, token_ends=ends, max_length=cap)


def numbered(name: str, words: int) -> str:
    return " ".join(f"{name}{i}" for i in range(1, words + 1))


@pytest.mark.parametrize(
    "jinja, cap, expected",
    [
        # 3 of the template and the end of sequence leave 4 of 8
        ("Say {{ s }} in short:", 8, "Say s1 s2 s3 s4 in short:"),
        ("{{ s }} ||| {{ t }}", 5, "s1 s2 s3 s4"),
        ("Say {{ s | upper }} in short:", 6, "Say S1 S2 in short:"),
        ("{{ [s, 'in short'] | join(' ') }}", 6, "s1 s2 s3 in short"),
        ("{{ '%s TL;DR:' | format(s) }}", 4, "s1 s2 TL;DR:"),
        ("{% if s %}Say {{ s }}{% else %}nothing{% endif %} now", 5, "Say s1 s2 now"),
        # the whole text has 159 characters: the branch must not change with what is left of it
        ("{{ s }} {% if s | length > 100 %}long{% else %}short{% endif %}", 4, "s1 s2 long"),
        ("{{ s }} {% if 's40' in s %}has it{% endif %}", 5, "s1 s2 has it"),
        ("{% if s.split() | length > 30 %}Say {{ s }} now{% else %}nothing{% endif %}", 5, "Say s1 s2 now"),
        ("{% if s.endswith('s40') %}Say {{ s }} now{% endif %}", 5, "Say s1 s2 now"),
        ("{{ s }} {{ 'long' if s | wordcount > 30 else 'short' }}", 4, "s1 s2 long"),
        ("{% set n = s.count('s') %}{{ s }} {% if n < 9 %}short{% elif n < 99 %}long{% endif %}", 4, "s1 s2 long"),
        ("{{ s | last }} {{ s }} end", 5, "2 s1 s2 end"),
        ("{{ {title: 'Yes', s: 'No'}[s] }} {{ s }} end", 5, "No s1 s2 end"),
        ("{% for w in s.split(' ') %}{{ w }} {% endfor %}end", 5, "s1 s2 s3 end"),
        ("{% set x %}Say {{ s }} now{% endset %}{{ x }} please", 7, "Say s1 s2 s3 now please"),
        ("{% macro ask(x) %}Q: {{ x }} A:{% endmacro %}{{ ask(s) }}", 5, "Q: s1 s2 A:"),
        ("{{ s }} again {{ s }}", 7, "s1 s2 again s1 s2"),  # 6 of 7: one more of each would be 8
        # short columns stay whole: they are not the longest
        ("{{ title }}: {{ s }} end", 6, "a b: s1 s2 end"),
        ("{% if title == 'a b' %}yes {{ s }} end{% endif %}", 5, "yes s1 s2 end"),
    ],
)
def test_the_document_is_cut_and_the_words_stay(jinja, cap, expected):
    assert shorten(jinja, cap, s=numbered("s", 40), title="a b", t="target") == expected


@pytest.mark.parametrize(
    "cap, expected",
    [
        (25, "A: a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 B: b1 b2 b3 b4 b5 b6 b7 b8 b9 b10 end"),
        (10, "A: a1 a2 a3 B: b1 b2 b3 end"),
        (6, "A: a1 B: b1 end"),
    ],
)
def test_of_several_variables_the_longest_is_cut_first_and_then_all_alike(cap, expected):
    found = shorten("A: {{ a }} B: {{ b }} end", cap, a=numbered("a", 100), b=numbered("b", 10))
    assert found == expected


@pytest.mark.parametrize(
    "jinja, cap, expected",
    [
        ("{% for u in talk %}- {{ u }}\n{% endfor %}Next?", 8, "- u1 v1\n- u2 v2\nNext?"),  # 3 + 3 + 1 + 1 = 8
        ("{{ talk | join(' ') }} Next?", 8, "u1 v1 u2 v2 u3 v3 Next?"),
        # conditions on the whole list, on each of its items, and on the loop over what is left
        ("{{ talk | join(' ') }}{% if talk | length > 9 %} Next?{% endif %}", 8, "u1 v1 u2 v2 u3 v3 Next?"),
        ("{% for u in talk if '0' in u or '2' in u %}{{ u }} {% endfor %}Next?", 5, "u2 v2 u10 Next?"),
        ("{% for u in talk %}{{ u }}{{ ' Next?' if loop.last else ',' }} {% endfor %}", 6, "u1 v1, u2 v2 Next?"),
        # what a template needs by its place is blank instead of missing
        ("{{ talk[0] }} / {{ talk[9] }} Next?", 5, "u1 v1 /  Next?"),
    ],
)
def test_lists_lose_what_is_behind_the_cut(jinja, cap, expected):
    assert shorten(jinja, cap, talk=[f"u{i} v{i}" for i in range(1, 11)]) == expected


@pytest.mark.parametrize(
    "jinja, expected",
    [
        # both lists are cut to three words; of the whole ones only the first two items of `facts` are bold
        (
            "{% macro show(all) %}{% for u in all %}{{ u }}{{ '*' if 'b' in u else '' }} {% endfor %}{% endmacro %}"
            "{{ show(facts) }}{{ show(talk) }}",
            "b1* b2* f3 u1 u2 u3",
        ),
        (
            "{% for u in talk %}{% for f in facts if 'f3' not in f %}{{ u }}{{ f }}{{ '*' if 'b' in f else '' }} "
            "{% endfor %}{% endfor %}",
            "u1b1* u1b2* u2b1* u2b2* u3b1* u3b2*",
        ),
    ],
)
def test_conditions_in_loops_are_those_of_the_same_round(jinja, expected):
    facts, talk = (["b1", "b2", "f3", "f4", "f5", "f6"], [f"u{i}" for i in range(1, 7)])
    assert shorten(jinja, 7, facts=facts, talk=talk) == expected


def test_mappings_in_lists():
    rows = [{"speaker": f"S{i}", "text": numbered("t", 5)} for i in range(9)]
    jinja = "{% for turn in rows %}{{ turn.speaker }} {{ turn.text }} {% endfor %}end"
    assert shorten(jinja, 7, rows=rows) == "S0 t1 t2 t3 t4 end"
    assert shorten(jinja, 10, rows=rows) == "S0 t1 t2 t3 t4 t5 S1 t1 end"


def test_random_choices_are_those_of_the_whole_row():
    jinja = "{{ ['one', 'two', 'three', 'four', 'five', 'six', 'seven'] | choice }} {{ s }} end"
    for n in range(20):
        whole = PromptTemplate("t", jinja).render({"s": numbered(f"x{n}_", 30)})
        cut = shortened(whole, count_tokens=count, token_ends=ends, max_length=7)
        assert cut.split()[0] == whole.split()[0] and cut.endswith(" end") and count(cut) == 7


def test_answer_choices_are_cut_too():
    template = PromptTemplate("t", "{{ s }} Of: {{ answer_choices | join(' or ') }}?", answer_choices="{{ a }} ||| no")
    prompt = template.render({"s": "s1 s2", "a": numbered("a", 50)})
    # s is short; 9 tokens less the end, "Of:", "or", "no?" and 2 of s leave 3 of the choice
    assert shortened(prompt, count_tokens=count, token_ends=ends, max_length=9) == "s1 s2 Of: a1 a2 a3 or no?"


@pytest.mark.parametrize("jinja", ["one two three four five {{ s }}", "one two three four five six seven"])
def test_a_template_with_too_many_words_is_an_error_that_shows_the_row(jinja):
    prompt = PromptTemplate("t", jinja).render({"s": numbered("s", 30)})
    measures = {"count_tokens": count, "token_ends": ends, "max_length": 6}
    assert not can_fit(prompt, **measures)
    with pytest.raises(InputError, match=r"cannot be cut to 6: with one token of each .* The row begins: '(s1|one)"):
        shortened(prompt, **measures)


def test_one_token_more_is_enough():
    assert shorten("one two three four five {{ s }}", 7, s=numbered("s", 30)) == "one two three four five s1"


def test_few_renderings():
    renderings = []
    prompt = PromptTemplate("t", "Say {{ s }} in short:").render({"s": numbered("s", 5000)})
    rendered = prompt._render
    prompt._render = lambda shorter: renderings.append(1) or rendered(shorter)
    assert count(shortened(prompt, count_tokens=count, token_ends=ends, max_length=1000)) == 1000
    assert len(renderings) <= 3


def test_a_prompt_is_pickled_as_text():
    prompt = pickle.loads(pickle.dumps(PromptTemplate("t", "Say {{ s }}").render({"s": "it"})))
    assert type(prompt) is str and prompt == "Say it"


def words_behind(template: PromptTemplate, row: dict) -> str:
    """What the template says after the document, found by rendering a document of one mark."""
    return template.render(row).rpartition("MARK")[2]


def all_sets() -> list:
    found = [pytest.param(PromptTemplates.builtin(task), id=task) for task in BUILTIN]
    if not PROMPTSOURCE.is_dir():
        found.append(pytest.param(None, marks=pytest.mark.skip(reason="promptsource's files are not here")))
    for file in sorted(PROMPTSOURCE.glob("*/templates.yaml")):
        found.append(pytest.param(PromptTemplates.from_yaml(file), id=file.parent.name))
    return found


@pytest.mark.parametrize("templates", all_sets())
def test_the_words_behind_the_document_survive_in_every_set(templates):
    for template in templates:
        variable = max(template.input_variables, key=lambda name: name != "answer_choices")
        short = {name: "MARK" for name in template.input_variables}
        prompt = template.render({**short, variable: numbered("d", 600)})
        cut = shortened(prompt, count_tokens=count, token_ends=ends, max_length=100)
        assert 98 < count(cut) <= 100  # some templates print the document twice
        behind = words_behind(template, {**short, variable: "MARK"})
        assert cut.endswith(behind) and " d20 d21 " in cut


WORDS = st.lists(st.sampled_from(["alpha", "b", "gamma-x", "δ", "e."]), max_size=30).map(" ".join)
PIECES = st.lists(
    st.sampled_from(
        [
            "{{ a }}",
            "{{ b|upper }}",
            "{% for x in c %}{{ x }} {% endfor %}",
            "{% if a %}{{ b }}{% endif %}",
            "T1",
            "T2",
        ]
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(PIECES, WORDS, WORDS, st.lists(WORDS, max_size=5), st.integers(2, 60))
def test_of_any_template_and_row_the_result_fits_and_keeps_the_words(pieces, a, b, c, cap):
    template = PromptTemplate("t", "START " + " ".join(pieces) + " END")
    prompt = template.render({"a": a, "b": b, "c": c})
    measures = {"count_tokens": count, "token_ends": ends, "max_length": cap}
    if count(prompt) <= cap:
        return
    try:
        cut = shortened(prompt, **measures)
    except InputError:
        # one token of each: START, END, end of sequence, template words, and at most one per use of a column
        assert cap < 3 + len(pieces)
        return
    own_words = [piece for piece in pieces if piece.startswith("T")]
    assert count(cut) <= cap
    assert [word for word in cut.split() if word in ("START", "T1", "T2", "END")] == ["START", *own_words, "END"]
