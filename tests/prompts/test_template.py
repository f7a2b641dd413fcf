"""One template: what is rendered, what is withheld, and what is refused with which message."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate


def template(jinja, **fields):
    return PromptTemplate("t", jinja, **fields)


def test_input_and_target_are_split_and_stripped():
    summarise = template("\nSummarise:\n\n{{document}} |||\n{{summary}} \n")
    row = {"document": "It rained.", "summary": "Rain."}
    assert summarise.render(row) == "Summarise:\n\nIt rained."
    assert summarise.render_example(row) == ("Summarise:\n\nIt rained.", "Rain.")


def test_variables():
    either = template("{% if a %}{{b}} ||| {{c}}{% else %}{{d}} ||| {{e}}{% endif %}{{f}}")
    assert either.variables == {"a", "b", "c", "d", "e", "f"}
    # Both branches reach their separator, so nothing after the if is input.
    assert either.input_variables == {"a", "b", "d"}
    assert template("{% if a %}{{b}} ||| {{c}}{% endif %}{{f}}").input_variables == {"a", "b", "f"}
    # zip is a global; i is set by the template itself.
    assert template("{% for i in zip(a, b) %}{{i}}{% endfor %} ||| {{c}}").input_variables == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        "a ||| b",
        "|||",
        "{{ 7*7 }} {% raw %} {# c #}",
        "first\r\nsecond\rthird",
        "Zażółć gęślą jaźń 日本 🙂 \u200b!",
        "<b>&amp; 'quoted'",
    ],
)
def test_data_is_literal(text):
    assert template("In: {{x}}. ||| Out: {{x}}.").render_example({"x": text}) == (f"In: {text}.", f"Out: {text}.")
    assert template("{{x[0].y}}. ||| .").render({"x": [{"y": text}]}) == f"{text}."


def test_a_template_may_take_the_separator_of_the_data_apart():
    apart = template("{{x.split('|||')[1]}}{% if '|||' in x and x != '|||' %}!{% endif %} ||| {{x}}")
    assert apart.render_example({"x": "a|||b"}) == ("b!", "a|||b")


def test_line_ends_of_the_template_become_newlines():
    assert template("One\r\nTwo {{x}}\r\n|||\r\n{{x}}").render_example({"x": "3"}) == ("One\nTwo 3", "3")


def test_separator_within_a_condition():
    gated = template("{% if x %}Q: {{x}} ||| {{y}}{% endif %}")
    assert gated.render_example({"x": "why?", "y": "so"}) == ("Q: why?", "so")


def test_answer_choices():
    review = template(
        "{{text}} {{answer_choices|join(' or ')}}? ||| {{answer_choices[label]}}", answer_choices="No ||| {{yes}}"
    )
    assert review.render_example({"text": "Good.", "yes": "Yes|||!", "label": 1}) == (
        "Good. No or Yes|||!?",
        "Yes|||!",
    )
    assert review.variables == {"text", "yes", "label"}
    assert review.input_variables == {"text", "yes"}
    # promptsource files also build the list with a filter
    listed = template("{{q}} ||| {{answer_choices[1]}}", answer_choices='{{options | join("|||")}}')
    assert listed.render_example({"q": "Which?", "options": ["red", "blue"]}) == ("Which?", "blue")
    # choices from a column that is missing do no harm if only the target uses them
    assert listed.render({"q": "Which?"}) == "Which?"


def test_promptsource_functions():
    assert template("{% for a, b in zip(x, y) %}{{a}}{{b}} {% endfor %}").render({"x": "ab", "y": [1, 2]}) == "a1 b2"
    assert template("{{x | most_frequent}}").render({"x": ["b", "a", "c", "a", "b"]}) == "['b', 'a']"
    assert template("{{x | most_frequent | choice}}").render({"x": ["b", "a", "a"]}) == "a"


CHOOSE = "{{['red', 'green', 'blue'] | choice}} {{['red', 'green', 'blue'] | random}} {{x}} ||| {{y}}"


def test_choice_depends_only_on_the_template_and_the_input_columns():
    first = [template(CHOOSE).render({"x": i}) for i in range(50)]
    assert first == [template(CHOOSE).render({"x": i, "y": -i, "id": 7}) for i in range(50)]
    # 9 pairs of draws over 50 rows; with a fixed draw there would be one
    assert len({prompt.rsplit(" ", 1)[0] for prompt in first}) >= 6
    assert first != [PromptTemplate("other", CHOOSE).render({"x": i}) for i in range(50)]


def test_choice_is_the_same_in_another_process_and_nothing_heavy_is_imported():
    code = (
        "import sys; from rlkd_trl.prompts import PromptTemplate\n"
        f"print([PromptTemplate('t', {CHOOSE!r}).render({{'x': i}}) for i in range(5)])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([template(CHOOSE).render({"x": i}) for i in range(5)])


def test_values_that_are_not_text():
    assert (
        template("{{a}} {{b}} {{c}} {{d}}").render({"a": 3, "b": 0.5, "c": True, "d": [1, "x"]})
        == "3 0.5 True [1, 'x']"
    )
    assert template("{{a}} {{b}}").render({"a": np.int64(3), "b": np.array([1, 2])}) == "3 [1, 2]"
    assert template("{{d.k}}").render({"d": {"k": "v"}}) == "v"


@pytest.mark.parametrize("empty", [None, float("nan"), np.float64("nan")])
def test_an_empty_value_is_not_printed(empty):
    with pytest.raises(
        InputError, match=r"'t' fails on a row: .*None or NaN; columns without a value in this row: a$"
    ):
        template("{{a}} {{b}}").render({"a": empty, "b": 1})
    assert template("{{b}}{% if a is not none and a > 0 %} {{a}}{% endif %}").render({"a": empty, "b": 1}) == "1"


def test_objects_are_refused_only_where_used():
    class Image:
        def save(self):
            raise AssertionError("a template called a method of an object in the row")

    assert template("{{b}} ||| {{image}}").render({"image": Image(), "b": "ok"}) == "ok"
    for use in ("{{image}}", "{{image.save()}}", "{{[image]}}"):
        with pytest.raises(InputError, match="column 'image' holds a Image"):
            template(use).render({"image": Image()})


def test_a_template_cannot_change_the_row():
    row = {"items": ["a"], "table": {"k": 1}}
    grow = template("{% set _ = items.append('b') %}{% set _ = table.update({'k': 2}) %}{{items}} {{table.k}}")
    assert grow.render(row) == grow.render(row) == "['a', 'b'] 2"
    assert row == {"items": ["a"], "table": {"k": 1}}


def test_target_columns_may_be_missing():
    for target in ("{{ref}}", "{{ref.split()[0]}}", "{% if ref == 'x' %}a{% endif %}", "{{1 + ref}}", "{{nothing()}}"):
        assert template("Say {{x}} ||| " + target).render({"x": "it"}) == "Say it"
    assert template("{% set r = ref %}Say {{x}} ||| {{r}}").render({"x": "it"}) == "Say it"
    with pytest.raises(
        InputError, match=r"'t' asks for column 'ref'; the row has: x\. Rename columns with --rename_col"
    ):
        template("Say {{x}} ||| {{ref}}").render_example({"x": "it"})


@pytest.mark.parametrize(
    "leak",
    [
        "{{ref}}",
        "{{ref ~ '.'}}",
        "{{[ref]}}",
        "{{ {'k': ref} }}",
        "{{ref|length}}",
        "{{ref|upper}}",
        "{{ref|pprint}}",
        "{{'%r'|format(ref)}}",
        "{{'{!r}'.format(ref)}}",
        "{{ref.split()}}",
        "{{ref[0]}}",
        "{% for word in ref %}{{word}}{% endfor %}",
        "{% if ref %}a{% endif %}",
        "{% if ref == 'x' %}a{% endif %}",
        "{% if 'x' in ref %}a{% endif %}",
        "{% set shown = ref %}{{shown}}",
        "{% macro m(r) %}{{r}}{% endmacro %}{{m(ref)}}",
        "{{['a', 'b'][ref]}}",
        "{% if x %}{{ref}} ||| {{x}}{% endif %}",
    ],
)
def test_input_columns_may_not_be_missing(leak):
    with pytest.raises(InputError) as caught:
        template(leak + " {{x}} ||| {{x}}").render({"x": "it", "mr": "m"})
    assert str(caught.value) == (
        "Template 't' asks for column 'ref'; the row has: x, mr. Rename columns with --rename_columns mr=ref, "
        "or leave this template out if that is the human reference: a prompt must not show it."
    )


def test_a_template_may_provide_for_a_missing_column():
    jinja = "{{x}}{% if title is defined %} ({{title}}){% endif %}{{ note | default('!') }}"
    assert template(jinja).render({"x": "it"}) == "it!"
    assert template(jinja).render({"x": "it", "title": "T", "note": "?"}) == "it (T)?"


def test_empty_prompt():
    gated = template("{% if x %}Q: {{x}}{% endif %} ||| {{y}}")
    with pytest.raises(InputError, match=r"'t' renders an empty prompt.*{% if"):
        gated.render({"x": "", "y": "so"})


@pytest.mark.parametrize("text, parts", [("no target {{x}}", 1), ("{{x}} ||| one ||| two", 3)])
def test_an_example_has_one_input_and_one_target(text, parts):
    assert template(text).render({"x": "it"}).endswith("it")
    with pytest.raises(InputError, match=f"'t' renders {parts} parts"):
        template(text).render_example({"x": "it"})


def test_a_template_that_fails_is_named():
    with pytest.raises(InputError, match=r"Template 't' of f.yaml fails on a row: TypeError: .*int.*str"):
        template("{{x + 'a'}}", origin="f.yaml").render({"x": 1})
    with pytest.raises(InputError, match="'dict object' has no attribute 'missing'"):
        template("{{x.missing}}").render({"x": {}})


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ x",
        "{% if x %}",
        "{{ x | no_such_filter }}",
        "{% nonsense %}",
        "{% for x in y %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_invalid_jinja(jinja):
    with pytest.raises(InputError, match=r"Template 't' of f.yaml is not valid jinja"):
        template(jinja, origin="f.yaml")
    with pytest.raises(InputError, match=r"Template 't' of f.yaml is not valid jinja"):
        template("fine", answer_choices=jinja, origin="f.yaml")


def test_the_line_of_a_syntax_error():
    with pytest.raises(InputError, match="not valid jinja, line 3: "):
        template("one\ntwo\n{{ three")


def test_pickles():
    summarise = template("Sum up: {{x}} ||| {{y}}")
    assert summarise.render({"x": "a"}) == "Sum up: a"
    copy = pickle.loads(pickle.dumps(summarise))
    assert copy == summarise
    assert copy.render({"x": "b"}) == "Sum up: b"
