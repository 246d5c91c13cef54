"""The Python code of docs/service.md and docs/python-api.md runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import genrec
from genrec.recommender import Recommender

DOCS = Path(__file__).parent.parent / "docs"


def code(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def shop(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The workspace as the current folder, and what makes code about the shop of the guide one about its data set."""
    monkeypatch.chdir(workspace)
    names = {"adapters/shop": "adapters/lora", "tea-1": "i1", "pot-1": "i2", "cup-1": "i3", "cup-2": "i4"}
    names |= {'"c1"': '"u1"', '"c2"': '"u2"', "Tetley": "studio 1"}

    def translated(text: str) -> str:
        for one, other in names.items():
            text = text.replace(one, other)
        return text

    return translated


def test_a_service_answers_concurrent_requests_in_micro_batches(
    shop: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = code("service.md")
    assert len([line for line in source.splitlines() if line.strip()]) <= 26
    calls: list[int] = []
    ask = Recommender.recommend

    def counted(self: Recommender, histories: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(histories))
        return ask(self, histories, *arguments, **options)

    monkeypatch.setattr(Recommender, "recommend", counted)
    service: dict[str, Any] = {"__name__": "service"}
    exec(shop(source), service)
    histories = [[f"i{number % 24}", f"i{(number * 5 + 1) % 24}"] for number in range(40)] + [[], ["nix"]]

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=service["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            first = await asyncio.gather(*(client.post("/recommend", json=history) for history in histories))
            return [*first, await client.post("/recommend", json=histories[0])]

    *found, again = asyncio.run(run())
    assert found[-1].status_code == 422
    assert "item 'nix' is not in the catalogue" in found[-1].json()["detail"]
    assert sum(calls) == len(histories)  # All but the bad one, and one more on its own.
    assert calls[-1] == 1
    assert max(calls) > 1
    expected = ask(service["recommender"], histories[:-1], 10)
    for response, items in zip(found, expected, strict=False):
        assert [one["item_id"] for one in response.json()] == [one.item_id for one in items]
        assert list(response.json()[0]) == ["rank", "item_id", "title", "score"]
    assert [one["item_id"] for one in again.json()] == [one["item_id"] for one in found[0].json()]


def test_the_code_of_the_guide_to_the_python_api_runs(
    shop: Callable[[str], str], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% block user %}Mine:{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}")
    names: dict[str, Any] = {}
    for part in code("python-api.md"):
        exec(shop(part).replace("prompts/mine.jinja", str(mine)), names)
    out = capsys.readouterr().out
    assert "is not the prompt that adapters/lora was trained with" in out
    assert "True <|begin|><|user|>Mine:<|end|>" in out
    assert isinstance(names["found"], genrec.Recommendations)
