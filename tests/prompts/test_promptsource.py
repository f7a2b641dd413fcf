"""The file format: safe YAML, its errors, and the files that T0 was trained with."""

import csv
from pathlib import Path

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not there")


def load(tmp_path, text, **kwargs):
    path = tmp_path / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return PromptTemplates.from_yaml(path, **kwargs)


@pytest.mark.parametrize(
    "text, message",
    [
        ("templates: [", "cannot be read as promptsource YAML"),
        (b"templates: \xff\xfe", "cannot be read as promptsource YAML: .*utf-8"),
        ("when: 2020-99-99", "cannot be read as promptsource YAML"),
        ("", "is not a promptsource file"),
        ("templates: {}", "is not a promptsource file"),
        ("templates: [a]", "is not a promptsource file"),
        ("templates: {a: text}", "template id a: expected a mapping .* found str"),
        ("templates: {a: {jinja: x}}", "template id a: 'name' must be text, found None"),
        ("templates: {a: {name: n}}", "template id a: 'jinja' must be text, found None"),
        ("templates: {a: {name: yes, jinja: x}}", "'name' must be text, found True; put it in quotes"),
        ("templates: {a: {name: n, jinja: x, answer_choices: [b]}}", "'answer_choices' must be text or null"),
        ("templates: {a: {name: n, jinja: x, metadata: b}}", "'metadata' must be a mapping"),
        (
            "templates: {a: {name: n, jinja: x, metadata: {original_task: maybe}}}",
            "'original_task' must be true or false",
        ),
        ("templates: {a: !Template [b]}", "cannot be read as promptsource YAML"),
        ("templates: {a: {name: broken, jinja: '{{ x'}}", r"'broken' of .*t\.yaml is not valid jinja, line 1"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!Other"])
def test_other_tags_construct_nothing(tmp_path, tag):
    made = tmp_path / "made"
    with pytest.raises(InputError, match="could not determine a constructor"):
        load(tmp_path, f"templates: {{a: {{name: n, jinja: {tag} [{str(made)!r}]}}}}")
    assert not made.exists()


def test_a_broken_template_matters_only_when_chosen(tmp_path):
    text = "templates: {a: {name: broken, jinja: '{{ x'}, b: {name: fine, jinja: 'Say {{x}}'}}"
    assert load(tmp_path, text, names="fine").render_source("it") == ["Say it"]


def test_crlf_byte_order_mark_and_unicode(tmp_path):
    text = "\ufefftemplates:\r\n  a: !Template\r\n    name: é\r\n    jinja: |\r\n"
    text += "      Résumé :\r\n      {{x}} ||| {{y}}\r\n"
    assert load(tmp_path, text, names="é").render({"x": "日本"}) == ["Résumé :\n日本"]


def test_original_task_null_is_as_missing(tmp_path):
    text = "templates: {a: !Template {name: n, jinja: x, metadata: !TemplateMetadata {original_task: null}}}"
    assert load(tmp_path, text).names == ["n"]


def test_a_directory_without_a_file(tmp_path):
    with pytest.raises(InputError, match=r"has no templates.yaml"):
        PromptTemplates.from_yaml(tmp_path)


@needs_shared_data
@pytest.mark.parametrize(
    "dataset, source, target, number",
    [
        ("cnn_dailymail", "article", "highlights", 7),
        ("e2e_nlg_cleaned", "meaning_representation", "human_reference", 4),
        ("samsum", "dialogue", "summary", 6),
        ("xsum", "document", "summary", 10),
    ],
)
def test_the_templates_of_t0(dataset, source, target, number):
    templates = PromptTemplates.load(str(SHARED_DATA / "promptsource" / dataset))
    assert len(templates) == number  # counted in the file: original_task: true
    assert templates.source_variable == source
    text = "name[Fitzbillies], food[Thai]"
    prompts = templates.render({source: text})
    assert len(set(prompts)) == number
    assert prompts == templates.render_source(text)
    assert all("Fitzbillies" in prompt and "|||" not in prompt for prompt in prompts)
    for template in templates:
        assert template.variables == {source, target}
        assert template.render_example({source: text, target: "Thai food."})[1] == "Thai food."


@needs_shared_data
def test_e2e_prompts_word_for_word():
    templates = PromptTemplates.load(
        str(SHARED_DATA / "promptsource" / "e2e_nlg_cleaned"), rename={"mr": "meaning_representation"}
    )
    with open(SHARED_DATA / "e2e" / "train.csv", encoding="utf-8", newline="") as rows:
        row = next(csv.DictReader(rows))
    del row["ref"]
    assert row == {"mr": "name[Alimentum], area[city centre], familyFriendly[no]"}
    prompts = dict(zip(templates.names, templates.render(row), strict=True))
    assert prompts["coherent_text"] == (
        "Please generate a restaurant description from the information given below:\n\n"
        "name[Alimentum], area[city centre], familyFriendly[no]"
    )
    # The loop prints "\n", a space and a newline around each feature; {%- endfor %} strips what follows the value.
    assert " ".join(prompts["generate_text_restaurant"].split()) == (
        "Given the following data about a restaurant: name : Alimentum area : city centre familyFriendly : no "
        "Generate some text about this restaurant."
    )


@needs_shared_data
def test_a_template_that_shows_the_reference_is_refused():
    directory = SHARED_DATA / "promptsource" / "e2e_nlg_cleaned"
    templates = PromptTemplates.load(str(directory), "area_qa", rename={"mr": "meaning_representation"})
    with pytest.raises(InputError, match=r"'area_qa' of .*templates\.yaml asks for column 'human_reference'"):
        templates.validate([{"mr": "name[Alimentum], area[city centre]"}])
    row = {"mr": "name[Alimentum], area[city centre]", "human_reference": "It is central."}
    assert templates.render(row) == [
        "It is central.\nFrom the passage given above, where is the location of the restaurant?"
    ]


@pytest.mark.parametrize(
    "text, names, prompts",
    [
        ('short: "Say {{ s }}"\ntldr: "{{ s }} TL;DR:"', ["short", "tldr"], ["Say it", "it TL;DR:"]),
        ('- "Say {{ s }}"\n- "{{ s }} TL;DR:"', ["template_1", "template_2"], ["Say it", "it TL;DR:"]),
        ("one: |\n  Say {{ s }}\n  now: ||| {{ t }}", ["one"], ["Say it\nnow:"]),
    ],
)
def test_the_short_form(tmp_path, text, names, prompts):
    templates = load(tmp_path, text)
    assert templates.names == names
    assert templates.render({"s": "it"}) == prompts
    assert load(tmp_path, text, names=[names[-1]]).render({"s": "it"}) == prompts[-1:]


@pytest.mark.parametrize(
    "text, message",
    [
        ("short: 3", "template 'short' must have a name and a text, found 3; .* short: \"Summarise: {{ source }}\""),
        ("- {a: b}", "template 'template_1' must have a name and a text, found {'a': 'b'}"),
        ("yes: text", "template True must have a name and a text"),
        ("dataset: xsum", "is not a promptsource file: .* The shortest file is"),
        ("just text", "is not a promptsource file: .* The shortest file is"),
        ("a: x {{ s }}\na: y", "the key 'a' is there twice"),
        ("templates: {1: {name: n, jinja: x}, 1: {name: m, jinja: y}}", "the key '1' is there twice"),
        (f"a: &a {'[' * 3000}", "cannot be read: its brackets are nested too deeply"),
    ],
)
def test_short_files_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, text)


def test_aliases_that_grow_stay_out_of_the_message(tmp_path):
    """10 ** 12 elements, if they were written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(InputError, match="'a0' must have a name and a text") as caught:
        load(tmp_path, "\n".join(lines))
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match="'jinja' must be text") as caught:
        load(tmp_path, "\n".join([*lines, "templates:", "  b: {name: n, jinja: *a11}"]))
    assert len(str(caught.value)) < 1000
