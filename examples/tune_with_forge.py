"""Tune a model with one call: from data to a judged adapter with its report and model card. Killed, it goes on.

    python examples/tune_with_forge.py
    python examples/tune_with_forge.py --model Qwen/Qwen3-0.6B --train chats.jsonl --validation 0.1
    python examples/tune_with_forge.py --config run.yaml
    python examples/tune_with_forge.py --request request.json --projects projects.json

Without arguments the model and the conversations that come with the examples are taken, for a few minutes on two cores.
`--config` is a YAML or JSON file of TuningConfig's fields. `--request` is a JSON object with `project_id` and
`fine_tuning_params`, and `--projects` one that says which folder each project's data are in. Variables such as
LORA_LEARNING_RATE and MLFLOW_TRACKING_URI count where neither argument nor request says otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path
from typing import Any

from forge import BertScore, ForgeError, LoRATuner, TuningConfig
from forge.assets import conversations, minilm, smollm2


def main() -> None:
    """Build the config, run, say what came of it."""
    options = parse_options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("forge").setLevel(logging.INFO)
    try:
        config = load_config(options)
        named = config.model_name or config.train_data
        tuner = LoRATuner(config=config) if named else demo(config)
        result = tuner.run(resume=not options.anew)
    except (ForgeError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt as stopped:
        raise SystemExit(f"\n{stopped or 'stopped; run the same again, and it goes on'}") from None
    result.print()
    for base, tuned in list(zip(result.base.answered, result.tuned.answered, strict=True))[:3]:
        print(f"\nasked      {base.question}\nreference  {base.reference}")
        print(f"base       {base.answer}\ntuned      {tuned.answer}")


def load_config(options: argparse.Namespace) -> TuningConfig:
    """From a file, a request, or the environment; what is on the command line goes before all of them."""
    named = {
        "model_name": options.model,
        "preset": options.preset,
        "train_data": options.train,
        "validation_data": number_or_path(options.validation),
        "output_dir": options.output,
        "bert_score": False if options.encoder == "none" else options.encoder,
    }
    said: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if options.config:
        return TuningConfig.from_file(options.config, **said)
    if options.request:
        request = read(options.request)
        projects = json.loads(read(options.projects)) if options.projects else {}
        return TuningConfig.from_request(request, projects=projects, **said)
    return TuningConfig.from_env(**said)


def read(path: str) -> str:
    """A file's text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be read: {error}") from None


def demo(config: TuningConfig) -> LoRATuner:
    """SmolLM2 and Chit-Chat, 48 held out, BERTScore by MiniLM; minutes on two cores."""
    # Four messages, so that a sample fits into the length.
    chats = [{"messages": chat[:4]} for chat in conversations(limit=800) if len(chat) >= 4]
    small = config.replace(
        max_length=128,
        effective_batch_size=8,
        overrides={"max_steps": 16, "logging_steps": 4, **config.overrides},
        bert_score=BertScore(minilm(), num_layers=6),
        max_eval_samples=24,
        max_new_tokens=32,
    )
    return LoRATuner(str(smollm2()), chats, 48, config=small)


def number_or_path(text: str | None) -> str | float | int | None:
    """`0.1` is a share of the rows, `200` so many of them, anything else a file or a hub id."""
    if text is None or not re.fullmatch(r"[0-9]*\.?[0-9]+", text):
        return text
    return float(text) if "." in text else int(text)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--train", help="a file, a folder or the id of a data set")
    parser.add_argument("--validation", help="the same, or a share (0.1) or number (200) of rows to hold out")
    parser.add_argument("--preset", choices=["qlora", "lora", "dpo"])
    parser.add_argument("--encoder", help="BERTScore's: a hub id or a folder, or none (roberta-large without it)")
    parser.add_argument("--output", help="the run's folder (outputs/tuning without it)")
    parser.add_argument("--anew", action="store_true", help="move a run that is there aside, and begin anew")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", help="a YAML or JSON file of TuningConfig's fields")
    source.add_argument("--request", help="a JSON file with project_id and fine_tuning_params")
    parser.add_argument("--projects", help="a JSON file: project id -> folder of its data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
