"""What a request may ask for, from the wire to the engine and back."""

from __future__ import annotations

import asyncio
import json
import re
from operator import itemgetter
from pathlib import Path
from typing import Any

import openai
import pytest

from serve_apps.answers import Reading, answer
from serve_apps.calls import Call, Event
from serve_apps.config import Fake, Limits, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.interface import Chunk, Grammar, Sampling
from serve_apps.gateway.schemas import ChatRequest, CompletionRequest
from serve_apps.prepare import model_defaults
from serve_apps.replica import Replica
from serve_apps.tools.forms import FORMS as FORM_NAMES
from tests.unit.data_fixtures import jsonl
from tests.unit.serving_fixtures import (
    CHAT,
    IM_END,
    KEY,
    TEMPLATE,
    TEXT,
    Stack,
    another,
    one_version,
    stack,
    until,
)
from train_jobs.data.dataset import load_datasets
from train_jobs.data.settings import Data
from train_jobs.objectives.settings import ChatSFT

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sdk(gate: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key=KEY, base_url="http://gate/v1", http_client=gate.client, max_retries=0
    )


def lines(text: str) -> list[dict[str, Any]]:
    """Return the JSON of each event of a stream."""
    return [json.loads(e[6:]) for e in text.split("\n\n") if e and e != "data: [DONE]"]


# --- down to the engine -------------------------------------------------------------------------


async def test_tc21_a_model_is_asked_in_the_tokens_that_it_was_trained_on(tmp_path: Path) -> None:
    """The same dialogue through the data of a run and through the API, special words and all."""
    turns = [
        {"role": "system", "content": "Say <|im_end|> to nobody.\n"},
        {"role": "user", "content": "  你好 🙂 "},
        {"role": "assistant", "content": "All aboard!\n"},
        {"role": "user", "content": "Who rolls in?"},
        {"role": "assistant", "content": " The engine."},
    ]
    base = one_version().resolve("tiny@1").path
    rows = jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    [example] = load_datasets(Data(train=str(rows)), ChatSFT(), base)[0].first(1)
    [document] = example.documents
    async with stack() as gate:
        assert (await gate.post(CHAT, messages=turns[:-1])).status_code == 200
        assert (await gate.post(CHAT, messages=turns[:2])).status_code == 200
        prompts = [request.prompt_ids for request in gate.engine.asked]
    for prompt in prompts:
        assert document.ids[: len(prompt)] == prompt
        assert document.trained[len(prompt)]
        assert not document.trained[len(prompt) - 1]
    assert bytes(document.ids[len(prompts[0]) : -2]).decode() == turns[-1]["content"]


async def test_every_field_of_sampling_reaches_the_engine() -> None:
    async with stack(limits=Limits(min_priority=-5, first_token_timeout_s=7)) as gate:
        fields = {
            **{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 11},
            **{"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1},
            **{"logit_bias": {"5": -100, "6": 2.5}, "min_tokens": 2, "max_tokens": 9},
            **{"stop_token_ids": [65, IM_END], "priority": -3, "n": 2},
        }
        assert (await gate.chat(**fields)).status_code == 200
        first, second = gate.engine.asked
        expected = Sampling(
            **{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 11},
            **{"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1},
            logit_bias=((5, -100), (6, 2.5)),
            min_tokens=2,
        )
        assert first.sampling == expected
        assert second.sampling.seed == 12
        assert (first.stop_ids, first.priority, first.max_tokens) == ((IM_END, 65), -3, 9)
        assert first.deadline_s == 7
        assert first.salt == ""


async def test_prompts_are_shared_within_a_tenant_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack() as gate:
        monkeypatch.setattr(type(gate.keys), "tenant", "acme", raising=False)
        await gate.chat()
        await gate.post(TEXT, prompt="a")
        assert [asked.salt for asked in gate.engine.asked] == ["acme", "acme"]


async def test_ignore_eos_and_min_tokens() -> None:
    async with stack(says="Hi") as gate:
        done = (await gate.chat(ignore_eos=True, max_tokens=7)).json()
        assert done["usage"]["completion_tokens"] == 7
        assert gate.engine.asked[0].stop_ids == ()
        done = (await gate.chat(min_tokens=4, max_tokens=9)).json()
        assert done["usage"]["completion_tokens"] >= 4


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


async def test_defaults_are_openais_unless_the_configuration_says_the_models() -> None:
    library = another(TEMPLATE, (), json.dumps(GENERATION))
    for model, expected in (
        ({}, Sampling()),
        ({"sampling_defaults": "model"}, Sampling(temperature=0.6, top_p=0.95, top_k=50)),
    ):
        async with stack(library=library, model=model) as gate:
            await gate.chat()
            await gate.chat(temperature=1, top_k=3)
            first, second = (asked.sampling for asked in gate.engine.asked)
            assert first == expected
            assert (second.temperature, second.top_k, second.top_p) == (1, 3, expected.top_p)


def test_a_model_that_says_nothing_of_sampling_is_greedy() -> None:
    assert model_defaults({"temperature": 0.6}) == {"temperature": 0.0}
    assert model_defaults(GENERATION)["top_k"] == 50


FORMS: dict[str, tuple[dict[str, Any], Grammar | None]] = {
    "text": ({"response_format": {"type": "text"}}, None),
    "object": (
        {"response_format": {"type": "json_object"}},
        Grammar("json_schema", '{"type":"object"}'),
    ),
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": None},
            }
        },
        Grammar("json_schema", '{"type": "integer"}'),
    ),
    "guided schema": (
        {"guided_json": '{"type":"null"}'},
        Grammar("json_schema", '{"type": "null"}'),
    ),
    "guided regex": ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    "guided choice": ({"guided_choice": ["a", 'b"']}, Grammar("lark", 'start: "a" | "b\\""\n')),
    "guided grammar": ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    "structured": ({"structured_outputs": {"regex": "[ab]"}}, Grammar("regex", "[ab]")),
    "structured object": (
        {"structured_outputs": {"json_object": True}},
        Grammar("json_schema", '{"type":"object"}'),
    ),
    "structured schema": (
        {"structured_outputs": {"json": {"type": "null"}}},
        Grammar("json_schema", '{"type": "null"}'),
    ),
}


@pytest.mark.parametrize("case", FORMS)
async def test_SC19_forms_of_an_answer_as_clients_ask_for_them(case: str) -> None:
    fields, grammar = FORMS[case]
    async with stack() as gate:
        for answered in (await gate.chat(**fields), await gate.post(TEXT, prompt="a", **fields)):
            assert answered.status_code == 200, answered.text
        assert [asked.sampling.grammar for asked in gate.engine.asked] == [grammar, grammar]


async def test_SC19_a_grammar_in_gbnf_is_translated() -> None:
    async with stack() as gate:
        answered = await gate.chat(guided_grammar='root ::= "a" | "b"')
        assert answered.status_code == 200, answered.text
        grammar = gate.engine.asked[0].sampling.grammar
        assert grammar
        assert "start:" in grammar.text


BAD_FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "two": ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one form"),
    "two inside": (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
        "one form",
    ),
    "no schema": (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "goes with",
    ),
    "odd name": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
        "pattern",
    ),
    "odd type": ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    "no JSON": ({"guided_json": "{"}, "guided_json", "no JSON"),
    "no object": ({"guided_json": "[1]"}, "guided_json", "object"),
    "empty choice": ({"guided_choice": []}, "guided_choice", "1 to 1024"),
    "empty regex": ({"guided_regex": ""}, "guided_regex", "empty"),
    "long": ({"guided_regex": "a" * 70_000}, "guided_regex", "limits.max_grammar_chars"),
    "broken regex": ({"guided_regex": "("}, "guided_regex", "guided_regex: "),
    "broken schema": ({"guided_json": {"type": 7}}, "guided_json", "guided_json: "),
    "broken grammar": ({"guided_grammar": "start: ("}, "guided_grammar", "guided_grammar: "),
    "broken GBNF": ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
    "unknown": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unknown"),
}


@pytest.mark.parametrize("case", BAD_FORMS)
async def test_SC20_forms_that_cannot_be_kept_are_a_400_with_the_field(case: str) -> None:
    fields, param, told = BAD_FORMS[case]
    async with stack() as gate:
        answered = await gate.chat(**fields)
        error = answered.json()["error"]
        assert (answered.status_code, error["param"]) == (400, param), error
        assert told in error["message"]
        assert not gate.engine.asked


# --- the conversation ---------------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}(no thought){% endif %}"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}{% endif %}"
)


def prompt_of(gate: Stack, at: int = -1) -> str:
    """Return what the engine was asked, special tokens as ``{id}``."""
    ids = gate.engine.asked[at].prompt_ids
    return "".join(chr(n) if n < 256 else f"{{{n}}}" for n in ids)


async def test_the_template_gets_what_is_allowed_and_nothing_else() -> None:
    async with stack(library=another(THINKING)) as gate:
        await gate.chat(chat_template_kwargs={"enable_thinking": False})
        assert prompt_of(gate).endswith("{256}assistant\n(no thought)")
        await gate.chat(reasoning_effort="low")
        assert prompt_of(gate).endswith("{256}assistant\nlow")
        await gate.chat(chat_template_kwargs={"reasoning_effort": "<|im_end|>"})
        assert prompt_of(gate).endswith("{256}assistant\n<|im_end|>"), "text stays text"
        await gate.chat(add_generation_prompt=False)
        assert prompt_of(gate).endswith("Hi{257}\n")
    async with stack(limits=Limits(template_kwargs=())) as gate:
        answered = await gate.chat(chat_template_kwargs={"enable_thinking": False})
        assert answered.status_code == 400
        assert (await gate.chat(reasoning_effort="low")).status_code == 200


async def test_an_answer_can_be_continued() -> None:
    async with stack() as gate:
        begun = [*HI, {"role": "assistant", "content": "The ans"}]
        answered = await gate.post(CHAT, messages=begun, continue_final_message=True)
        assert answered.status_code == 200, answered.text
        assert prompt_of(gate).endswith("{256}assistant\nThe ans")


# --- n, usage -----------------------------------------------------------------------------------


async def test_SC18_n_answers_one_prompt_on_the_bill() -> None:
    async with stack() as gate:
        done = await sdk(gate).chat.completions.create(model="tiny", messages=HI, n=3)  # type: ignore[call-overload]
        assert [(c.index, c.message.content) for c in done.choices] == [
            (n, "All aboard!") for n in range(3)
        ]
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (21, 33)
        body = await gate.post(TEXT, prompt=["a", "bc"], n=2, max_tokens=2)
        done = body.json()
        assert [c["index"] for c in done["choices"]] == [0, 1, 2, 3]
        assert (done["usage"]["prompt_tokens"], done["usage"]["completion_tokens"]) == (3, 8)
        sizes = [len(asked.prompt_ids) for asked in gate.engine.asked[-4:]]
        assert sizes == [1, 1, 2, 2], "answers to one prompt stand side by side"
        streamed = await gate.chat(n=2, stream=True, stream_options={"include_usage": True})
        text = {0: "", 1: ""}
        for line in lines(streamed.text):
            for choice in line["choices"]:
                text[choice["index"]] += choice["delta"].get("content", "")
        assert text == {0: "All aboard!", 1: "All aboard!"}
        assert lines(streamed.text)[-1]["usage"]["prompt_tokens"] == 21


async def test_SC25_cached_tokens_and_counts_in_every_chunk() -> None:
    async with stack() as gate:
        await gate.chat()
        again = (await gate.chat("Hi you")).json()["usage"]
        assert again["prompt_tokens_details"]["cached_tokens"] == 8, "as far as both are alike"
        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = await gate.chat(stream=True, stream_options=options)
        counts = [line["usage"]["completion_tokens"] for line in lines(streamed.text)]
        assert counts == sorted(counts)
        assert counts[-1] == 11


# --- log-probabilities --------------------------------------------------------------------------


async def test_SC17_logprobs_of_a_chat_stream_as_plain() -> None:
    async with stack(says="né→!") as gate:
        fields = {"logprobs": True, "top_logprobs": 2}
        plain = (await gate.chat(**fields)).json()["choices"][0]["logprobs"]["content"]
        assert [one["token"] for one in plain] == ["n", *"\ufffd" * 5, "!"]
        assert bytes(b for one in plain for b in one["bytes"]).decode() == "né→!"
        assert all(one["logprob"] == -0.25 and len(one["top_logprobs"]) == 2 for one in plain)
        assert plain[0]["top_logprobs"][1] == {"token": "o", "logprob": -0.5, "bytes": [111]}
        streamed = lines((await gate.chat(stream=True, **fields)).text)
        scored = [
            one
            for line in streamed
            for choice in line["choices"]
            if choice["logprobs"]
            for one in choice["logprobs"]["content"]
        ]
        assert scored == plain
        done = await sdk(gate).chat.completions.create(model="tiny", messages=HI, logprobs=True)  # type: ignore[call-overload]
        assert done.choices[0].logprobs.content[0].top_logprobs == []
        assert (await gate.chat()).json()["choices"][0]["logprobs"] is None


async def test_SC17_SC21_scores_end_where_the_text_does() -> None:
    async with stack(says="All aboard!") as gate:
        fields = {"prompt": "a", "logprobs": 0, "stop": "boa", "max_tokens": 99}
        [choice] = (await gate.post(TEXT, **fields)).json()["choices"]
        assert choice["text"] == "All a"
        assert "".join(choice["logprobs"]["tokens"]) == "All a"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
        assert choice["logprobs"]["top_logprobs"][0] == {"A": -0.25}


# What lm-evaluation-harness sends from `local-completions`, and how it reads the answer.


def harness_scores(answered: dict[str, Any], context: list[int]) -> list[tuple[float, bool]]:
    """Return (sum of log-probabilities, greedy) of each continuation, as the harness does."""
    scores = []
    for choice, size in zip(
        sorted(answered["choices"], key=itemgetter("index")), context, strict=True
    ):
        found = choice["logprobs"]["token_logprobs"][size:-1]
        top = choice["logprobs"]["top_logprobs"][size:-1]
        scores.append(
            (sum(found), all(a == max(b.values()) for a, b in zip(found, top, strict=True)))
        )
    return scores


async def test_SC27_the_harness_scores_continuations() -> None:
    async with stack() as gate:
        body = {
            **{"prompt": [[97, 98, 99, 100], [97, 98, 120]], "temperature": 0, "max_tokens": 1},
            **{"logprobs": 1, "seed": 1234, "echo": True},
        }
        answered = (await gate.post(TEXT, **body)).json()
        assert harness_scores(answered, [2, 2]) == [(-0.5, True), (-0.25, True)]
        first = answered["choices"][0]
        assert first["text"] == "abcdA"
        assert first["logprobs"] == {
            "tokens": ["a", "b", "c", "d", "A"],
            "token_logprobs": [None, -0.25, -0.25, -0.25, -0.25],
            "top_logprobs": [None, *({t: -0.25} for t in "bcdA")],
            "text_offset": [0, 1, 2, 3, 4],
        }
        assert answered["usage"]["completion_tokens"] == 2
        rolling = await gate.post(TEXT, **{**body, "prompt": [[IM_END, 97]], "max_tokens": 0})
        [choice] = rolling.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("a", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
        assert choice["logprobs"]["tokens"] == ["<|im_end|>", "a"]
        assert rolling.json()["usage"]["completion_tokens"] == 0


async def test_SC27_a_model_that_would_end_at_once_is_scored_all_the_same() -> None:
    async with stack(says="") as gate:
        body = {"prompt": [[97, 98, 99, 100]], "temperature": 0, "max_tokens": 1, "logprobs": 1}
        answered = (await gate.post(TEXT, echo=True, **body)).json()
        assert harness_scores(answered, [2]) == [(-0.5, True)]
        [plain] = (await gate.post(TEXT, **body)).json()["choices"]
        assert (plain["text"], plain["finish_reason"]) == ("", "stop")


async def test_SC27_the_harness_generates() -> None:
    async with stack() as gate:
        body = {"prompt": ["a"], "max_tokens": 5, "temperature": 0, "stop": ["o", "zz"], "seed": 1}
        answered = (await gate.post(TEXT, **body)).json()
        assert [c["text"] for c in answered["choices"]] == ["All a"]


async def test_SC27_echo_streams_the_prompt_first() -> None:
    async with stack() as gate:
        fields = {"prompt": "né", "echo": True, "logprobs": 1, "max_tokens": 3}
        plain = (await gate.post(TEXT, **fields)).json()["choices"][0]
        streamed = lines((await gate.post(TEXT, stream=True, **fields)).text)
        text = "".join(line["choices"][0]["text"] for line in streamed)
        assert text == plain["text"] == "néAll"
        keys = [
            token
            for line in streamed
            if line["choices"][0]["logprobs"]
            for token in line["choices"][0]["logprobs"]["tokens"]
        ]
        assert keys == plain["logprobs"]["tokens"]
        assert keys[1:3] == ["bytes:\\xc3", "bytes:\\xa9"], "halves of a character have names"
        echo = (await gate.post(TEXT, prompt="ab", echo=True, max_tokens=0)).json()["choices"][0]
        assert (echo["text"], echo["logprobs"]) == ("ab", None)


# --- chunks -------------------------------------------------------------------------------------


class Paced:
    """An engine's stream on a clock of its own: tokens merge while nobody looks."""

    version = "v"

    def __init__(self, times: list[float]) -> None:
        self.now, self._times, self.closed = 100.0, [100.0 + t for t in times], False

    def clock(self) -> float:
        return self.now

    async def rest(self, seconds: float) -> None:
        self.now = min(self.now + seconds, max(self.now, self._times[-1]))

    def __aiter__(self) -> Paced:
        return self

    async def __anext__(self) -> Chunk:
        self.now = max(self.now, self._times[0])
        there = [t for t in self._times if t <= self.now]
        del self._times[: len(there)]
        finish = None if self._times else "length"
        return Chunk("c", (65,) * len(there), finish)  # type: ignore[arg-type]

    async def aclose(self) -> None:
        self.closed = True


async def paces(times: list[float], interval_s: float | None) -> list[tuple[float, int]]:
    """Return when each event left, and how many tokens there were by then."""
    text = one_version().resolve("tiny").path
    from cluster.text.chat import ChatText

    stream = Paced(times)
    reading = Reading(ChatText.load(text).stream())
    events = answer(0, stream, reading, 1, lambda: interval_s, stream.clock)
    return [(round(stream.now - 100, 4), e.completion_tokens) async for e in events]


async def test_SC24_the_first_token_never_waits_and_the_rest_at_most_10_ms() -> None:
    fast = [0.5 + 0.001 * n for n in range(40)]
    left = await paces(fast, 0.01)
    assert left[0] == (0.5, 1)
    assert left[-1][1] == 40
    assert len(left) <= 7, "forty tokens in forty milliseconds"
    out = [next(when for when, tokens in left if tokens > n) for n in range(40)]
    assert max(a - b for a, b in zip(out, fast, strict=True)) <= 0.0101


async def test_SC24_a_slow_engine_is_never_waited_for() -> None:
    slow = [0.5 + 0.03 * n for n in range(10)]
    assert [when for when, _ in await paces(slow, 0.01)] == [round(t, 4) for t in slow]
    assert [t for _, t in await paces([0.001 * n for n in range(9)], 0.0)] == list(range(1, 10))


async def test_SC24_the_end_waits_for_nobody() -> None:
    left = await paces([0.001 * n for n in range(15)], 0.5)
    assert left[-1] == (0.014, 15)


async def test_SC24_a_plain_answer_crosses_as_two_events() -> None:
    assert [tokens for _, tokens in await paces([0.01 * n for n in range(50)], None)] == [1, 50]
    replica = Replica(
        ModelConfig(model="tiny", engine=Fake(kind="fake")),
        FakeEngine(Fake(kind="fake"), says=[65]),
        one_version(),
    )
    await replica.start()
    call = Call("c", 50, False, prompts=("a",), interval_s=None)
    events = [e async for e in replica.generate(call) if isinstance(e, Event)]
    assert ["".join(e.text for e in events), len(events)] == ["A" * 50, 2]
    await replica.stop()


# --- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
async def test_SC12_a_client_that_leaves_is_forgotten_at_once(stream: bool, queued: bool) -> None:
    async with stack(says=None, token_delay_s=0.05, max_concurrent=1) as gate:
        ahead = asyncio.create_task(gate.chat(max_tokens=200)) if queued else None
        await until(lambda: len(gate.engine.asked) == int(queued), "one is ahead, or none")
        going = asyncio.create_task(gate.chat(max_tokens=200, stream=stream))
        await until(lambda: len(gate.engine.asked) == 1 + queued, "it is in the engine")
        going.cancel()
        began = asyncio.get_running_loop().time()
        await until(lambda: len(gate.engine._held) == int(queued), "the engine has let go")
        assert asyncio.get_running_loop().time() - began < 0.2 * 5
        assert (await gate.engine.stats()).aborted == 1
        if ahead:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
        await asyncio.gather(going, return_exceptions=True)


async def test_SC24_many_streams_share_the_chunks_of_a_second() -> None:
    limits = Limits(stream_interval_ms=0, stream_chunks_per_s=50)
    async with stack(says=[65], limits=limits, token_delay_s=0.002, max_concurrent=8) as gate:

        async def chunks() -> int:
            answered = await gate.chat(max_tokens=60, stream=True)
            said = [line["choices"][0]["delta"].get("content") for line in lines(answered.text)]
            assert "".join(text or "" for text in said) == "A" * 60
            return sum(map(bool, said))

        counts = await asyncio.gather(*(chunks() for _ in range(8)))
        assert max(counts) < 30, "each chunk waits for 8 / 50 s"
        assert (await gate.chat(max_tokens=1)).status_code == 200
        assert gate.replica._streaming == 0


# --- logs ---------------------------------------------------------------------------------------


async def test_T07_nothing_that_was_said_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    canary = "canary-7f3a"
    tools = [{"type": "function", "function": {"name": canary}}]
    for fake in ({}, {"fail_at_token": 3}, {"hang_at_token": 3}):
        limits = Limits(request_timeout_s=0.3)
        async with stack(says=f"{canary}-said", limits=limits, **fake) as gate:
            for stream in (False, True):
                for fields in ({}, {"tools": tools}, {"temperature": canary}, {canary: 1}):
                    await gate.chat(canary, stream=stream, **fields)
                await gate.post(TEXT, prompt=canary, stream=stream, echo=True, logprobs=1)
            await gate.client.post(CHAT, content=canary, headers={"authorization": canary})
    assert caplog.records, "failures are logged"
    for record in caplog.records:
        if record.name.startswith(("httpx", "httpcore")):  # the client's own
            continue
        assert canary not in record.getMessage()
        assert KEY not in record.getMessage()
        assert canary not in (record.exc_text or "")


# --- documentation ------------------------------------------------------------------------------


def test_every_field_and_every_code_is_documented() -> None:
    root = Path(__file__).parents[2]
    told = (root / "docs" / "api.md").read_text()
    for kind in (ChatRequest, CompletionRequest):
        for name in kind.model_fields:
            assert f"`{name}`" in told, name
    for name in re.findall(r"limits\.(\w+)", told):
        assert name in Limits.model_fields, name
    for name in FORM_NAMES:
        assert f"`{name}`" in told, name
    codes = set()
    for path in [*(root / "serve_apps").glob("*.py"), *(root / "serve_apps/gateway").glob("*.py")]:
        codes |= set(re.findall(r"\b[45]\d\d,\s+\"([a-z_]+)\"", path.read_text()))
    assert len(codes) > 15
    hidden = {"internal_error", "method_not_allowed", "invalid_request", "no_metrics"}
    assert {code for code in codes if f"`{code}`" not in told} <= hidden
