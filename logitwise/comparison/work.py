"""The work of one comparison: answers, token probabilities and scores of every model, stored or served."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from logitwise.comparison.asked import Asked, as_tokens
from logitwise.comparison.asking import as_served, ask_answers, ask_reported, shows_thinking
from logitwise.comparison.candidates import Candidate
from logitwise.comparison.findings import Json, answer_findings, as_json, token_findings
from logitwise.comparison.harness import Harness
from logitwise.comparison.scores import marks, sampled_findings, task_findings
from logitwise.comparison.served import Prompt, Served
from logitwise.comparison.standard import Scored, score, standard_findings
from logitwise.comparison.teacher import Teacher, beside, rows_of, teach
from logitwise.comparison.written import Answers, Manner, write_answers
from logitwise.head import Head
from logitwise.measure.coarse import coarse_divergence
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.watch import Watcher

SAMPLE_TEMPERATURE = 0.8


class Work:
    """The steps of one comparison, each of which the run folder keeps."""

    def __init__(
        self,
        reference: Candidate,
        others: list[Candidate | Served],
        asked: Asked,
        manner: Manner,
        folder: RunFolder,
        watcher: Watcher,
    ) -> None:
        self.reference, self.others, self.asked, self.manner = reference, others, asked, manner
        self.folder, self.watcher = folder, watcher
        self.skeleton = Skeleton(reference.source, torch.device(manner.device), torch.float32)
        self.tokenizer = reference.source.tokenizer()
        self.prompts = self._read(asked.prompts)
        self.problems = self._read([problem.prompt for problem in asked.problems])
        self.texts = [str(self.tokenizer.decode(prompt.ids)) for prompt in self.prompts]
        for other in others:
            if isinstance(other, Served):
                other.check_room([*self.prompts, *self.problems], manner.answer_tokens)

    def _read(self, words: list[str]) -> list[Prompt]:
        ids = as_tokens(self.tokenizer, self.reference.source.config, words)
        return [Prompt(*both) for both in zip(words, ids, strict=True)]

    def write(
        self,
        candidate: Candidate | Served,
        prompts: list[Prompt],
        manner: Manner,
        ends: Sequence[int] = (),
        title: str = "answers",
    ) -> Answers:
        """A model's answers; `ends` are those of full precision, where it is not that model."""
        if isinstance(candidate, Served):
            return ask_answers(candidate, prompts, manner, ends, self.folder, self.watcher, title)
        ids = [prompt.ids for prompt in prompts]
        return write_answers(candidate, self.tokenizer, ids, manner, self.folder, self.watcher, title, ends)

    def prove(self) -> None:
        """Refuses a model that cannot be replayed block by block, before anything is written.

        Errors: SourceError.
        """
        with self.watcher.stage("Proving the replay", 1) as stage:
            self.skeleton.prove()
            stage.advance()

    def answers(self) -> tuple[Answers, list[Answers]]:
        """Every model's greedy answers to the prompts, full precision's first."""
        own = self.write(self.reference, self.prompts, self.manner)
        return own, [self.write(other, self.prompts, self.manner, own.ends) for other in self.others]

    def references(self, own: Answers) -> list[Answers]:
        """Full precision's answers as each of the others is compared with them."""
        return [as_served(own, other) if isinstance(other, Served) else own for other in self.others]

    def answers_beside(self, candidate: Candidate | Served, written: Answers, own: Answers) -> Json:
        """What became of a model's answers."""
        if not isinstance(candidate, Served):
            return answer_findings(written, own, self.texts, self.tokenizer)
        found = answer_findings(written, as_served(own, candidate), self.texts, self.tokenizer)
        return found if shows_thinking(candidate) else {**found, "thinking": None}

    def tokens(self, answers: Answers) -> Json:
        """Every other model's probabilities on full precision's answers, and those of full precision in bfloat16."""
        original, skeleton, device = self.reference, self.skeleton, torch.device(self.manner.device)
        rows = rows_of([prompt.ids for prompt in self.prompts], answers.ids)
        teacher = teach(original, rows, skeleton, self.folder, self.watcher)
        head = skeleton.head(original.source)

        def measure(candidate: Candidate, through: Skeleton) -> Json:
            found = beside(teacher, head, candidate, through, self.folder, self.watcher)
            return token_findings(found, teacher, answers.ends, self.tokenizer)

        def of(other: Candidate | Served) -> Json | None:
            if isinstance(other, Served):
                return self._reported(other, answers, teacher, head)
            return measure(other, skeleton)

        noisy = Skeleton(original.source, device, torch.bfloat16)
        noise = measure(replace(original, name=f"{original.name} in bfloat16"), noisy)
        return {
            "noise": {**noise, "stored_kl": as_json(teacher.stored_kl)},
            "models": [of(other) for other in self.others],
            "count": len(teacher.written),
        }

    def _reported(self, served: Served, answers: Answers, teacher: Teacher, head: Head) -> Json | None:
        """What a server says of full precision's answers; None where it says nothing of them."""
        if served.log_probabilities is None:
            return None
        said = ask_reported(served, self.prompts, answers.ids, self.folder, self.watcher)
        left_out = int((~said.told).sum())
        if left_out:
            why = "where the server reads other tokens, or does not tell which is the likeliest"
            self.watcher.say(f"{served.name}: {left_out} positions are left out, {why}")
        if not said.told.any():
            return None
        teacher = teacher.only(said.told)
        found = coarse_divergence(said.only_told(), teacher.hidden, head, teacher.written)
        coarse = {"likeliest": served.likeliest, "left_out": left_out}
        return token_findings(found, teacher, answers.ends, self.tokenizer, coarse)

    def scores(self, ends: Sequence[int], samples: int) -> list[Json]:
        """Every model's problems solved, by greedy answers, and by sampled ones where they are asked for."""
        found, greedy = [], list[list[bool]]()
        for candidate in (self.reference, *self.others):
            written = self.write(candidate, self.problems, self.manner, ends, "problems")
            greedy.append(marks(written, self.asked, self.tokenizer))
            scored = task_findings(greedy[-1], greedy[0], self.manner.seed)
            if samples:
                manner = replace(self.manner, temperature=SAMPLE_TEMPERATURE)
                tried = [problem for problem in self.problems for _ in range(samples)]
                drawn = marks(self.write(candidate, tried, manner, ends, "samples"), self.asked, self.tokenizer)
                scored["pass_at_k"] = {"temperature": SAMPLE_TEMPERATURE, "values": sampled_findings(drawn, samples)}
            found.append(scored)
        return found

    def standard(self, harness: Harness) -> list[list[Json] | None]:
        """Every model's figures in lm_eval's tasks; None of a server's model, which lm_eval is not given."""

        def run(candidate: Candidate) -> dict[str, Scored]:
            return score(harness, candidate, self.tokenizer, self.manner, self.folder, self.watcher)

        original = run(self.reference)
        found: list[list[Json] | None] = [standard_findings(harness.items, original, None, self.manner.seed)]
        for other in self.others:
            if isinstance(other, Served):
                self.watcher.say(f"{other.name}: lm_eval's tasks are not run on a server's model")
                found.append(None)
            else:
                found.append(standard_findings(harness.items, run(other), original, self.manner.seed))
        return found
