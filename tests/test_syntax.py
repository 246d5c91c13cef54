"""What an error of syntax says. The trees are read in test_templates.py, by what prompts are refused."""

from __future__ import annotations

import pytest

from genrec.templates import Inspection


def sequence(item: str = "{{ item.identifier }}", user: str = "Next:") -> str:
    return f"{{% block user %}}{user}{{% endblock %}}\n{{% block item %}}{item}{{% endblock %}}"


@pytest.mark.parametrize(
    ("source", "place", "message", "fix"),
    [
        (sequence("{{ item.identifier }"), (2, 36), "unexpected '}'", "Write `}}` where the `{{` before it ends."),
        (sequence("{{ item.identifier }}{{ item.title }x"), (2, 52), "unexpected '}'", "Write `}}` where the `{{`"),
        (sequence("{{ item.identifier "), (2, 36), "got '{'", "Write `}}` where the `{{` before it ends."),
        ("{% block item %}{{ item.identifier", (1, 25), "unexpected end", "Write `}}` where the `{{` before it ends."),
        (sequence("{{ item.identifier }}{% if item.title }x{% endif %}"), (2, 55), "unexpected '}'", "Write `%}`"),
        ("{# {% block user %} #}{% block item %}{{ item.identifier }}", (1, 23), "`block item` is never closed",
         "Write `{% endblock %}` where it ends."),
        ("{% block user %}x\n{% block item %}{{ item.identifier }}{% endblock %}", (1, 1),
         "`block user` is never closed", "Write `{% endblock %}` where it ends."),
        ("{% block user %}{% if user.age %}x", (1, 17), "`if` is never closed", "Write `{% endif %}` where it ends."),
        (sequence("{{ item.identifier }}{{ item.title.upper() }}"), (2, 41), "`item.title.upper()` is not allowed",
         "Write the filter `| upper`."),
        (sequence("{{ item.identifier }}{{ item.title.strip() }}"), (2, 41), "is not allowed", "Use text"),
        ("{% set x = 1 %}" + sequence(), (1, 4), "`set` is not allowed in a prompt.", "Use text"),
        (sequence("{{ item.identifier }}{% set x %}y{% endset %}"), (2, 41), "`set` is not allowed", "Use text"),
    ],
)  # fmt: skip
def test_a_mistake_of_syntax_says_what_to_write(source: str, place: tuple[int, int], message: str, fix: str) -> None:
    (problem,) = Inspection(source).problems
    assert message in problem.message
    assert fix in problem.fix
    assert (problem.line, problem.column) == place
