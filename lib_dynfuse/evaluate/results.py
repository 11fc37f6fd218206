"""What a study's participants and judges said, as plain data for a report and as text for the terminal.

A share is {"mean", "low", "high"}: low and high bound the 95 % bootstrap interval, and are None where nothing can be drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .folder import RECORD, Evaluation
from .judge.verdicts import KIND as JUDGE
from .judge.verdicts import runs_of
from .preferences import ALARM, PLAIN_SUM, Positions, Preference, followers, majority, positions, preferences
from .study.sheets import KIND as STUDY
from .summary import is_plain_sum
from .votes import Ballot, read_ballots

Result = dict[str, Any]


def plain_sum(folder: Path) -> str:
    """What the folder's plans call the plain sum of both LoRAs; "direct" where they have none."""
    if (folder / RECORD).exists():
        for method in Evaluation.open(folder).methods:
            if is_plain_sum(method):
                return method.name
    return PLAIN_SUM


def study_result(folder: Path) -> Result | None:
    """Of all participants together; None where nobody has chosen yet. Raises EvaluationError for a file that cannot be read.

    {"participants", "answers", "skipped", "questions": texts, "pictures": numbers of pictures shown at once, "plain_sum",
     "methods": [{"method", "shown", "chosen", "share", "of_all", "over_plain_sum"}, ...],
     "positions": {"counts": {"2": [left, right]}, "chance"}, "followers": [{"voter", "file", "counts", "chance"}, ...], "notes"}

    notes: what a reader of the shares must know, a sentence each. share: of the questions that showed a method; of_all: of all votes;
    over_plain_sum: see preferences.Preference. chance: how likely such counts, or less even ones, are if the position has no say.
    """
    ballots = [ballot for ballot in read_ballots(folder) if ballot.kind == STUDY and any(vote.chosen is not None for vote in ballot.votes)]
    if not ballots:
        return None
    reference = plain_sum(folder)
    chosen = [vote for ballot in ballots for vote in ballot.votes if vote.chosen is not None]
    voters = {ballot.name: ballot.voter for ballot in ballots}
    where = _positions(positions(chosen))
    found = [{"voter": voters[name], "file": name, **_positions(mine)} for name, mine in followers(ballots).items()]
    if len(ballots) > 1:
        drawn = "95 % bootstrap intervals over participants and questions."
    else:
        drawn = "95 % bootstrap intervals over questions: one participant says nothing about other people."
    named = [f"Votes that follow the position: {one['voter']} ({one['file'][:14]}...). {_places(one)}" for one in found]
    return {
        "participants": len(ballots),
        "answers": len(chosen),
        "skipped": sum(vote.chosen is None for ballot in ballots for vote in ballot.votes),
        "questions": _texts(ballots),
        "pictures": sorted({len(vote.shown) for vote in chosen}),
        "plain_sum": reference,
        "methods": _methods(preferences(ballots, reference)),
        "positions": where,
        "followers": found,
        "notes": [drawn, _places(where), *(named or [f"Nobody's votes follow the position (p < {ALARM:g} over all participants)."])],
    }


def judge_results(folder: Path) -> list[Result]:
    """Of each judge. Raises EvaluationError for a file that cannot be read.

    As of a study, but {"judge", "asked", "answers", "without": answers that are no vote, "undecided": questions that no method won}; a
    question is won by the method that more than half of its runs chose, and "share" is of the questions that were decided.
    """
    results = []
    reference = plain_sum(folder)
    for ballot in read_ballots(folder):
        if ballot.kind != JUDGE or not ballot.votes:
            continue
        decided = majority(ballot, runs_of(folder, ballot.name))
        chosen = [vote for vote in ballot.votes if vote.chosen is not None]
        without, undecided = len(ballot.votes) - len(chosen), sum(vote.chosen is None for vote in decided.votes)
        where = _positions(positions(chosen))
        notes = [
            f"A method wins a question with more than half of its runs; {_count(undecided, 'question')} of {len(decided.votes)} undecided, "
            f"{_count(without, 'answer')} of {len(ballot.votes)} no vote.",
            "95 % bootstrap intervals over questions.",
            _places(where),
        ]
        if where["chance"] < ALARM:
            notes.append("This judge follows the position: its shares mean little.")
        results.append(
            {
                "judge": ballot.voter,
                "file": ballot.name,
                "asked": len(decided.votes),
                "answers": len(ballot.votes),
                "without": without,
                "undecided": undecided,
                "questions": [ballot.question],
                "pictures": sorted({len(vote.shown) for vote in ballot.votes}),
                "plain_sum": reference,
                "methods": _methods(preferences([decided], reference)),
                "positions": where,
                "notes": notes,
            }
        )
    return results


def study_text(result: Result | None) -> str:
    """For the terminal."""
    if result is None:
        return "Nobody has chosen a picture yet.\n"
    head = (
        f"{_count(result['participants'], 'participant')}, {_count(result['answers'], 'vote')}, {result['skipped']} skipped. "
        f"Shown at once: {_joined(result['pictures'])}."
    )
    return "\n".join([head, "", *_table(result), "", *result["notes"]]) + "\n"


def judge_text(result: Result) -> str:
    """For the terminal."""
    head = f"{result['judge']}: {_count(result['asked'], 'question')}, {_count(result['answers'], 'answer')}."
    return "\n".join([head, "", *_table(result), "", *result["notes"]]) + "\n"


def _methods(found: Sequence[Preference]) -> list[dict[str, Any]]:
    return [asdict(preference) for preference in found]


def _positions(where: Positions) -> dict[str, Any]:
    return {"counts": {str(shown): list(counts) for shown, counts in where.counts.items()}, "chance": where.chance}


def _texts(ballots: Sequence[Ballot]) -> list[str]:
    return sorted({ballot.question for ballot in ballots})


def _table(result: Mapping[str, Any]) -> list[str]:
    methods = result["methods"]
    if not methods:
        return ["No method won a question."]
    width = max(6, *(len(method["method"]) for method in methods))
    lines = [f"{'method':<{width}}  {'shown':>6} {'chosen':>6}   {'share where shown':<20}  {'of all':<20}  less {result['plain_sum']}"]
    for method in methods:
        over = method["over_plain_sum"]
        lines.append(
            f"{method['method']:<{width}}  {method['shown']:>6} {method['chosen']:>6}   {_share(method['share']):<20}  "
            f"{_share(method['of_all']):<20}  {_share(over, '+') if over else ''}".rstrip()
        )
    return lines


def _share(estimate: Mapping[str, float | None], sign: str = "") -> str:
    mean, low, high = (
        None if estimate[name] is None else f"{100 * float(estimate[name] or 0):{sign}.1f}" for name in ("mean", "low", "high")
    )
    return f"{mean} %" if low is None else f"{mean} % [{low}, {high}]"


def _places(where: Mapping[str, Any]) -> str:
    counts = "; ".join(f"of {shown}: {', '.join(map(str, votes))}" for shown, votes in where["counts"].items())
    return f"Votes by position, {counts} (p = {where['chance']:.2g} if it has no say)."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _joined(numbers: Sequence[int]) -> str:
    return " and ".join(f"{number} pictures" for number in numbers)


__all__ = ["JUDGE", "STUDY", "Result", "judge_results", "judge_text", "plain_sum", "study_result", "study_text"]
