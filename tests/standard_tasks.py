"""Two tasks of lm_eval's kind, on made-up documents, and a group: small stand-ins for data sets that need a network."""

import json
from pathlib import Path

CHOICE = """
task: made_up_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/choice.jsonl}}, cache_dir: {place}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""

WRITTEN = """
task: made_up_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/written.jsonl}}, cache_dir: {place}/cache}}
output_type: generate_until
test_split: test
fewshot_split: test
num_fewshot: 1
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function scoring.first_letter
metric_list: [{{metric: vowel, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{until: ["."], do_sample: false, max_gen_toks: 6}}
metadata: {{version: 2.0}}
"""

READ = """
task: made_up_read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/written.jsonl}}, cache_dir: {place}/cache}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{prompt}}}} {{{{answer}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1.0}}
"""

GROUP = """
group: made_up_group
task: [made_up_choice, made_up_written]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 3.0}
"""

SCORING = """
def first_letter(doc, results):
    return {"vowel": float(results[0].strip()[:1] in "aeiou")}
"""

CHOICES = ["hen", "ant", "tan", "net"]
PROMPTS = ["the man met the", "a hat and a", "what is the", "then the", "one more", "an ant ate the"]


def write_tasks(place: Path) -> Path:
    """The folder of the tasks, its documents beside it."""
    folder = place / "made_up"
    folder.mkdir()
    asked = [f"{first} {text}" for first in ("so", "now", "if", "yes") for text in PROMPTS]
    choice = [{"prompt": text, "choices": CHOICES, "gold": place % 4} for place, text in enumerate(asked)]
    written = [{"prompt": text, "answer": "hen."} for text in PROMPTS]
    for name, lines in (("choice", choice), ("written", written)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("read", READ)):
        (folder / f"{name}.yaml").write_text(text.format(place=place), encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "scoring.py").write_text(SCORING, encoding="utf-8")
    return folder
