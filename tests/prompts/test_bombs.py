# ruff: noqa: E501
"""Templates that would run for ever, or fill the memory, end soon in one InputError, and the next one renders."""

import os
import resource
import subprocess
import sys
import time

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, bounds, process

BILLION = "999999999"
LOOP = "{% for a in range(99999) %}"
# Of a text that is doubled in each round: 2 ** 60 characters.
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}{{ n.x|length }}"

BOMBS = {
    # endless, or as good as
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": LOOP + LOOP + "{% endfor %}{% endfor %}",
    "three nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "loops that print": LOOP + LOOP + "{{ a }}{% endfor %}{% endfor %}",
    "loop over what it appends to": "{% set l = [1] %}{% for i in l %}{% set _ = l.append(i) %}{% endfor %}",
    "the same, printing nothing": "{% set l = [1] %}{% for i in l if l.append(i) %}{% endfor %}",
    "recursive loop": "{% set l = [] %}{% set _ = l.append(l) %}{% for i in l recursive %}{{ loop(i) }}{% endfor %}",
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "call blocks": "{% macro m(n) %}{% if n %}{% call m(n-1) %}{% endcall %}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "cycler": LOOP + LOOP + "{{ cycler('', '').next() }}{% endfor %}{% endfor %}",
    "joiner": "{% set j = joiner('') %}" + LOOP + LOOP + "{{ j() }}{% endfor %}{% endfor %}",
    "sum of lists": "{{ (range(99999)|batch(1)|list)|sum(start=[])|length }}" * 9,
    "sort in a loop": LOOP + "{% set _ = range(99999)|map('string')|sort %}{% endfor %}",
    "unique in a loop": LOOP + "{% set _ = range(99999)|unique|list %}{% endfor %}",
    "group in a loop": LOOP + "{% set _ = range(99999)|map('string')|groupby('length')|list %}{% endfor %}",
    "product of zips": LOOP + "{% for b in zip(range(99999), range(99999)) %}{% endfor %}{% endfor %}",
    # numbers
    "power of powers": "{{ 9**(9**9) }}",
    "power by a loop": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "power filter": "{% set n = namespace(x=10**3000) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "float power": "{{ 9.0**9999 }}",
    "number to text": "{{ (9**3000)|string * 99999 }}",
    "bytes of a number": f"{{{{ (1).to_bytes({BILLION}, 'big')|length }}}}",
    "factorial": LOOP
    + "{% set n = namespace(x=1) %}{% for b in range(1, 99999) %}{% set n.x = n.x * b %}{% endfor %}{% endfor %}",
    # texts
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated text twice": "{{ ('a' * 9999999)|list|length }}{{ ('a' * 9999999).split('a')|length }}" * 50,
    "repeated list": "{{ [0] * 10**10 }}",
    "repeated by its other side": f"{{{{ {BILLION} * 'ab' }}}}",
    "repeated through a method": f"{{{{ 'a'.__mul__({BILLION}) }}}}",
    "doubling by ~": DOUBLED.replace("STEP", "n.x ~ n.x"),
    "doubling by +": DOUBLED.replace("STEP", "n.x + n.x"),
    "doubling by join": DOUBLED.replace("STEP", "[n.x, n.x]|join"),
    "doubling by replace": DOUBLED.replace("STEP", "n.x|replace('a', 'aa')"),
    "doubling by format": DOUBLED.replace("STEP", "'%s%s'|format(n.x, n.x)"),
    "doubling by format's method": DOUBLED.replace("STEP", "'{0}{0}'.format(n.x)"),
    "doubling by a set block": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "doubling a list": "{% set l = [1] %}{% for i in range(60) %}{% set _ = l.extend(l) %}{% endfor %}",
    "nesting lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "percent width": f"{{{{ '%{BILLION}d' % 1 }}}}",
    "percent precision": f"{{{{ '%.{BILLION}f' % 1.5 }}}}",
    "percent star": f"{{{{ '%*d' % ({BILLION}, 1) }}}}",
    "format filter": f"{{{{ '%{BILLION}s'|format('a') }}}}",
    "format width": f"{{{{ '{{:>{BILLION}}}'.format('a') }}}}",
    "format width by argument": f"{{{{ '{{:>{{}}}}'.format('a', {BILLION}) }}}}",
    "center filter": f"{{{{ 'a'|center({BILLION}) }}}}",
    "center": f"{{{{ 'a'.center({BILLION}) }}}}",
    "ljust": f"{{{{ 'a'.ljust({BILLION}) }}}}",
    "rjust": f"{{{{ 'a'.rjust({BILLION}) }}}}",
    "zfill": f"{{{{ 'a'.zfill({BILLION}) }}}}",
    "expandtabs": f"{{{{ '\\t'.expandtabs({BILLION}) }}}}",
    "indent filter": f"{{{{ 'a\\nb'|indent({BILLION}) }}}}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "replace nothing": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "join": "{{ range(99999)|join('b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "tojson": f"{{{{ [[1]]|tojson({BILLION}) }}}}",
    "batch": f"{{{{ [1]|batch({BILLION}, 0)|list }}}}",
    "slice": f"{{{{ [1]|slice({BILLION}, 0)|list|length }}}}",
    "wordwrap": "{{ ('a' * 9999999)|wordwrap(1, True, 'b' * 9999) }}",
    "urlize": "{{ (('http://' * 99999) ~ 'a')|urlize }}" * 99,
    "striptags": LOOP + "{% set _ = ('<a>' * 99999)|striptags %}{% endfor %}",
    "pprint": "{% set l = [1] %}{% for i in range(24) %}{% set l = l + l %}{% endfor %}{{ (range(99999)|list * 99)|pprint }}",
    "dictsort": LOOP + "{% set _ = dict(zip(range(99999)|map('string'), range(99999)))|dictsort %}{% endfor %}",
    "long output": LOOP + "{{ 'a' * 999999 }}{% endfor %}",
    # while it is read
    "nested brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "nested lists": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested loops that do not end": LOOP * 3000 + "{% endfor %}" * 3000,
    "long sum": "{{ " + "1+" * 99999 + "1 }}",
    "long chain of filters": "{{ 1" + "|string" * 99999 + " }}",
    "many nots": "{{ " + "not " * 99999 + "1 }}",
    "many minuses": "{{ " + "-" * 99999 + "1 }}",
}


# In the second that a prompt has: loops, long calls of C code, numbers. The others in a tenth of it.
SLOW = ("factorial", "dictsort", "joiner")
# One of each kind, for the quick subset.
QUICK = ("range", "power of powers", "repeated text", "percent width", "long output", "nested brackets")


@pytest.fixture(scope="module")
def new_renderer():
    """The CPU time of a process is counted when it ends, and the first one's is to be of these tests alone."""
    if "templates" in process._renderers:
        process._renderers.pop("templates").end()


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow(1.2 if n in SLOW else 0.2)) for n in BOMBS],
)
def test_a_bomb_ends_soon_in_one_error(name, monkeypatch, new_renderer):
    if name not in SLOW:
        monkeypatch.setattr(bounds, "CPU_SECONDS", 0.1)
    children, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    with pytest.raises(InputError, match=r"^Template 't' ") as caught:
        PromptTemplate("t", BOMBS[name]).render({"s": "data"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message.strip()
    # CPU time, since other work may share the machine: there one second at most, and the start; next to none here.
    assert time.process_time() - started < 0.5
    assert after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime < 2.5
    assert PromptTemplate("t", "Say {{ s }}").render({"s": "it"}) == "Say it"


def test_memory_stays_bounded():
    """In a process of its own, whose children nothing else has filled."""
    program = """
import resource
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate
for bomb in ("{{ 'a'|center(10**10) }}", "{% set x = 'a' * 9000000 %}{% set y = x.replace('a', 'b' * 9999) %}"):
    try:
        PromptTemplate("t", bomb).render({})
    except InputError as error:
        assert "takes more than 768 MiB of memory" in str(error), error
    else:
        raise SystemExit("no error")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, status["VmHWM"].split()[0])
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    of_renderer, of_this = map(int, output.stdout.split())
    assert of_renderer < 800 * 1024 and of_this < 200 * 1024


def test_bounds_hold_for_every_row(monkeypatch):
    monkeypatch.setattr(bounds, "CPU_SECONDS", 0.1)
    template = PromptTemplate("t", "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}{{ n }}")
    assert [template.render({"n": n}) for n in (1, 100, 3)] == ["1", "100", "3"]
    with pytest.raises(InputError, match=r"takes more than 0.1 s of CPU time for one prompt"):
        template.render({"n": 99999})
    assert template.render({"n": 5}) == "5"


def test_the_renderer_ends_with_its_owner():
    """Also where the owner is killed, and so can end nothing."""
    program = """
import os, signal
from rlkd_trl.prompts import PromptTemplate, process
PromptTemplate("t", "{{ s }}").render({"s": "x"})
print(process._renderers["templates"]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pid = int(output.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail(f"the renderer {pid} lives on")


def test_a_fork_has_its_own_renderer():
    assert PromptTemplate("t", "{{ s }}").render({"s": "here"}) == "here"
    child = os.fork()
    if child == 0:
        found = [PromptTemplate("t", "{{ s }}").render({"s": str(n)}) for n in range(50)]
        os._exit(0 if found == [str(n) for n in range(50)] else 1)
    found = [PromptTemplate("t", "{{ s }}").render({"s": str(n)}) for n in range(50, 100)]
    assert found == [str(n) for n in range(50, 100)]
    assert os.waitpid(child, 0)[1] == 0


def test_files_that_lie_around_are_not_imported(tmp_path):
    (tmp_path / "jinja2.py").write_text("open('imported', 'w')")
    (tmp_path / "pickle.py").write_text("open('imported', 'w')")
    program = "import os, sys; sys.path.remove(''); os.chdir('WHERE')\nfrom rlkd_trl.prompts import PromptTemplate\n"
    program += "print(PromptTemplate('t', 'Say {{ s }}').render({'s': 'it'}))"
    command = [sys.executable, "-c", program.replace("WHERE", str(tmp_path))]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "Say it\n"
    assert not (tmp_path / "imported").exists()
