"""Templates may come from anywhere: what they try beyond text ends in an InputError, and nothing is executed."""

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate


def template(jinja, **fields):
    return PromptTemplate("t", jinja, **fields)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ ['']|map(attribute='__class__')|list }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ zip.__base__ }}",
        "{% for c in x %}{{ loop._iterable }}{% endfor %}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0.__class__!r}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ('{0.__cl' ~ 'ass__}')|attr('format')(1) }}",
    ],
)
def test_python_internals_are_out_of_reach(attack):
    with pytest.raises(InputError, match="'t' does what the sandbox forbids: access to attribute '_"):
        template(attack).render({"x": "data"})


@pytest.mark.parametrize(
    "attack, reason",
    [
        ("{{ range(10**9)|list }}", "Range too big"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**9 }}", "repeats to more than 10000000 elements"),
        ("{{ 10**9 * [0] }}", "repeats to more than 10000000 elements"),
        ("{{ 10**(10**10) }}", "a number of more than 10000 bits"),
        ("{% for i in range(99999) %}{{ x * 999999 }}{% endfor %}", "renders more than 10000000 characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}{{ os }}", "no loader"),
        ("{{ open('/etc/passwd').read() }}", "asks for column 'open'"),
        ("{{ lipsum() }}", "asks for column 'lipsum'"),
    ],
)
def test_other_attacks_are_refused(attack, reason):
    with pytest.raises(InputError, match=f"Template 't' .*{reason}"):
        template(attack).render({"x": "data"})


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.mkdir(x) }}",
        "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].mkdir(x) }}",
        "{{ zip.__base__.__subclasses__()[0](x) }}",
        "{{ ''.__class__.__base__.__subclasses__()[0](x) }}",
    ],
)
def test_nothing_is_executed(attack, tmp_path):
    with pytest.raises(InputError, match=r"sandbox forbids|has no attribute '__globals__'"):
        template(attack).render({"x": str(tmp_path / "made")})
    assert not list(tmp_path.iterdir())


def test_a_forbidden_attribute_is_named():
    with pytest.raises(
        InputError, match=r"'t' of f.yaml does what the sandbox forbids: .*'__class__' of 'str' object"
    ):
        template("{{ ''.__class__ }}", origin="f.yaml").render({})


def test_nothing_runs_while_a_template_is_loaded():
    template("{{ 10**(10**10) }}{{ 'a'|center(10**12) }}{{ '%999999999999d' % 1 }}{{ ''.__class__ }}")
