"""Sets of templates: choosing, renaming, rendering, and the built-in sets."""

import pickle

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates

TWO = [PromptTemplate("short", "Sum up: {{doc}} ||| {{ref}}"), PromptTemplate("long", "{{doc}}\nTL;DR: ||| {{ref}}")]

FILE = """
dataset: news
templates:
  id-1: !Template
    name: short
    jinja: 'Sum up: {{doc}} ||| {{ref}}'
    answer_choices: null
    metadata: !TemplateMetadata
      original_task: true
  id-2: !Template
    name: backwards
    jinja: 'Write the article for: {{ref}} ||| {{doc}}'
    metadata: !TemplateMetadata
      original_task: false
  id-3: !Template
    name: long, with comma
    jinja: |-
      {{doc}}
      TL;DR: ||| {{ref}}
  id-4: !Template
    name: twin
    jinja: 'Twin one {{doc}}'
    metadata: !TemplateMetadata {original_task: false}
  id-5: !Template
    name: twin
    jinja: 'Twin two {{doc}}'
    metadata: !TemplateMetadata {original_task: false}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_is_a_sequence_of_templates():
    templates = PromptTemplates(TWO)
    assert len(templates) == 2
    assert list(templates) == TWO
    assert templates[1] is TWO[1]
    assert templates[1:].names == ["long"]
    assert templates.names == ["short", "long"]
    assert templates.render({"doc": "rain"}) == ["Sum up: rain", "rain\nTL;DR:"]


def test_no_templates():
    with pytest.raises(InputError, match="at least one is needed"):
        PromptTemplates([])


@pytest.mark.parametrize("as_directory", [True, False])
def test_all_are_those_of_the_original_task(file, as_directory):
    templates = PromptTemplates.load(str(file.parent if as_directory else file))
    assert templates.names == ["short", "long, with comma"]  # without metadata: original
    assert templates.render({"doc": "rain"}) == ["Sum up: rain", "rain\nTL;DR:"]


@pytest.mark.parametrize("names", [["backwards", "short"], "backwards,short", " backwards , short "])
def test_by_name_in_the_order_asked(file, names):
    assert PromptTemplates.load(str(file), names).names == ["backwards", "short"]


def test_a_name_may_contain_a_comma(file):
    assert PromptTemplates.load(str(file), "long, with comma").names == ["long, with comma"]


@pytest.mark.parametrize(
    "names, message",
    [
        ("backward", "has no template 'backward'; it has: backwards, short, long, with comma, twin, twin"),
        (["short", "twin"], "has 2 templates named 'twin'"),
        (["short", "short"], "'short' was named twice"),
        ([], "No template names were given"),
        (" , ", "No template names were given"),
    ],
)
def test_names_that_do_not_fit(file, names, message):
    with pytest.raises(InputError, match=message):
        PromptTemplates.load(str(file), names)


def test_nothing_of_the_original_task(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("templates: {a: {name: back, jinja: x, metadata: {original_task: false}}}")
    with pytest.raises(InputError, match="no template of the original task; choose by name: back"):
        PromptTemplates.load(str(path))


def test_rename_adds_an_alias():
    templates = PromptTemplates([PromptTemplate("t", "{{doc}} {{text}} ||| {{ref}}")], rename={"text": "doc"})
    row = {"text": "rain"}
    assert templates.render(row) == ["rain rain"]
    assert row == {"text": "rain"}


def test_rename_of_a_column_that_is_not_there():
    with pytest.raises(InputError, match="--rename_columns mr=doc: the row has no column 'mr'; it has: text, id"):
        PromptTemplates(TWO, rename={"mr": "doc"}).render({"text": "rain", "id": 1})


def test_rename_to_a_variable_that_is_not_there(file):
    with pytest.raises(InputError, match=r"--rename_columns mr=dco: .* no variable 'dco'; theirs are: doc, ref"):
        PromptTemplates.load(str(file), rename={"mr": "dco"})


def test_render_source():
    templates = PromptTemplates(TWO, rename={"mr": "doc"})
    assert templates.source_variable == "doc"
    assert templates.render_source("a ||| {{b}}") == ["Sum up: a ||| {{b}}", "a ||| {{b}}\nTL;DR:"]


@pytest.mark.parametrize("other", ["{{title}}: {{doc}}", "{{document}}", "no column"])
def test_render_source_needs_one_common_column(other):
    with pytest.raises(InputError, match=r"all read the same one column. These read: short: doc; other: "):
        PromptTemplates([TWO[0], PromptTemplate("other", other)]).render_source("rain")


def test_validate_names_template_and_row():
    templates = PromptTemplates(TWO)
    templates.validate([])
    templates.validate([{"doc": "a"}, {"doc": "b"}])
    with pytest.raises(InputError, match=r"^Row 2: Template 'short' asks for column 'doc'; the row has: text"):
        templates.validate([{"doc": "a"}, {"text": "b"}])


def test_pickles():
    templates = PromptTemplates(TWO, rename={"mr": "doc"})
    assert pickle.loads(pickle.dumps(templates)).render({"mr": "x"}) == ["Sum up: x", "x\nTL;DR:"]


@pytest.mark.parametrize("task", ["data_to_text", "dialogue", "paraphrase", "summarisation"])
def test_builtin_sets(task):
    templates = PromptTemplates.load(f"builtin:{task}")
    assert len(templates) == 4
    assert len(set(templates.names)) == 4
    text = "name[The Mill], food[Thai]"
    prompts = templates.render_source(text)
    assert len(set(prompts)) == 4
    assert all(prompt.count(text) == 1 and len(prompt) > len(text) + 10 for prompt in prompts)
    for template in templates:
        assert template.variables == {"source", "target"}
        assert template.render_example({"source": text, "target": "Thai food."})[1] == "Thai food."


def test_a_builtin_prompt_word_for_word():
    templates = PromptTemplates.builtin("data_to_text", names="facts_to_text", rename={"mr": "source"})
    assert templates.render({"mr": "name[The Mill], food[Thai]"}) == [
        "Here are some facts: name[The Mill], food[Thai]\n\nWrite one or two sentences that say all of them."
    ]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("builtin:summary", "no built-in templates for 'summary'; tasks: data_to_text, dialogue, paraphrase, summar"),
        ("builtin:../builtin/dialogue", "no built-in templates"),
        ("dialogue", "give builtin:dialogue"),
        ("missing.yaml", "no prompt template file missing.yaml"),
    ],
)
def test_specs_that_do_not_fit(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        PromptTemplates.load(spec)


def test_a_template_may_be_a_plain_text():
    assert PromptTemplates.inline("Say {{ s }}").render({"s": "it"}) == ["Say it"]
    templates = PromptTemplates(["Say {{ s }}", PromptTemplate("named", "{{ s }}!")])
    assert templates.names == ["template_1", "named"]
    assert templates.render({"s": "it"}) == ["Say it", "it!"]
    assert PromptTemplates.inline("Say {{ s }}", {"mr": "s"}).render({"mr": "it"}) == ["Say it"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptTemplates("Say {{ s }}"), "One text is no list"),
        (lambda: PromptTemplates.inline("Say {{ s"), "Template 'template' is not valid jinja"),
        (lambda: PromptTemplates.inline("Say {{ s }}", {"a": "b"}), "--template have no variable 'b'; theirs are: s"),
    ],
)
def test_plain_texts_that_do_not_fit(make, message):
    with pytest.raises(InputError, match=message):
        make()
