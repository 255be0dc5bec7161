"""What the report of cot-22m is made from: prompts, problems with answers, and other prompts to calibrate on.

    python benchmarks/report_inputs.py --eval eval --out FOLDER

Writes prompts.txt (20 of the five tasks, 20 of chats), tasks.jsonl (100 problems) and calibration.txt (1,200 prompts of
tasks, the chats' first 200). The three have no problem in common.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """The three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(given.eval))
    from cot_tasks import TASKS, make

    def prompts(seed: int, count: int) -> list[str]:
        return [problem.prompt for task in TASKS for problem in make(task, seed, count)]

    def chats(name: str, count: int) -> list[str]:
        lines = (given.eval / name).read_text("utf-8").splitlines()[:count]
        return [json.loads(line)["prompt"] for line in lines]

    problems = [problem for task in TASKS for problem in make(task, 920_000, 20)]
    answers = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
    given.out.mkdir(parents=True, exist_ok=True)
    asked = prompts(910_000, 4) + chats("chat_test.jsonl", 20)
    for name, lines in {
        "prompts.txt": asked,
        "tasks.jsonl": answers,
        "calibration.txt": prompts(930_000, 240) + chats("chat_valid.jsonl", 200),
    }.items():
        text = "".join(f"{' '.join(line.splitlines())}\n" for line in lines)
        (given.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
