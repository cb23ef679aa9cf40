"""What a student learns from: any text, with the tokens of its teacher. No torch."""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.library.store import Library
from cluster.text.chat import ChatText
from train_jobs.objectives.settings import Distillation


def check_teacher(settings: Distillation, student: ChatText) -> None:
    """Refuse a teacher that is not there or has other tokens; a served one is in the library."""
    found = Library().resolve(settings.served or settings.teacher)
    same_tokens(student, ChatText.load(found.path), found.ref)


def same_tokens(student: ChatText, teacher: ChatText, name: str) -> None:
    """Refuse a teacher that numbers its tokens otherwise: its distribution would be over others."""
    ours = student.tokenizer.get_vocab(with_added_tokens=True)
    theirs = teacher.tokenizer.get_vocab(with_added_tokens=True)
    if ours == theirs:
        return
    odd = min(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (min(ours.get(token, 1 << 40), theirs.get(token, 1 << 40)), token),
    )
    raise ConfigError(
        f"objective.teacher: {name} has other tokens than the student ({len(theirs)} and "
        f"{len(ours)}; {odd!r:.40} is number {theirs.get(odd)} there and {ours.get(odd)} here); "
        "distillation compares token by token: choose a teacher of the same family"
    )
