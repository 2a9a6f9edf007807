"""What the presets produce, in the standard trainers: no exception, no warning of our making, weights that move."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, set_seed
from trl import DPOTrainer, SFTConfig, SFTTrainer

from forge import ForgeError, get_preset
from support import data
from support.models import nf4_model, text_model

SMALL = {"hardware": "cpu", "max_steps": 3, "effective_batch_size": 2, "max_length": 64, "logging_steps": 1}
NAMES = ("qlora", "lora", "sft", "dpo")


def common(preset, folder, args):
    args.output_dir = str(folder / "out")
    args.save_strategy = "no"
    args.disable_tqdm = True
    return {"args": args, "peft_config": preset.get_lora_config(), "callbacks": preset.get_callbacks()}


def base_model(name, folder):
    """From a folder, as users have it: without adapters, TRL before 1.16 loads DPO's reference by the model's name."""
    if name == "qlora":
        return nf4_model(folder / "base")
    text_model().save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_sft_trainer(name, tmp_path, tokenizer):
    preset = get_preset(name, **SMALL)
    trainer = SFTTrainer(
        model=base_model(name, tmp_path),
        train_dataset=data.sft_messages(6),
        processing_class=tokenizer,
        **common(preset, tmp_path, preset.get_sft_config()),
    )
    trainer.train()
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_dpo_trainer(name, tmp_path, tokenizer):
    preset = get_preset(name, **SMALL)
    trainer = DPOTrainer(
        model=base_model(name, tmp_path),
        train_dataset=data.dpo_preferences(6),
        processing_class=tokenizer,
        **common(preset, tmp_path, preset.get_dpo_config()),
    )
    if name != "sft":
        assert trainer.ref_model is None  # the adapter is switched off instead
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693, abs=1e-3)  # log 2: the policy starts as its reference


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_plain_trainer(name, tmp_path, tokenizer):
    from peft import get_peft_model

    settings = {key: value for key, value in SMALL.items() if key != "max_length"}
    preset = get_preset(name, **settings)
    model = base_model(name, tmp_path)
    options = common(preset, tmp_path, preset.get_training_args())
    lora = options.pop("peft_config")
    trainer = Trainer(
        model=get_peft_model(model, lora) if lora else model,
        train_dataset=data.lm_tokens(6),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        **options,
    )
    trainer.train()
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize("hardware_features", [{"activation_checkpointing": True}, {"bf16": True, "precision": "bf16"}])
@pytest.mark.parametrize("name", ["lora", "dpo"])
@pytest.mark.usefixtures("no_foreign_warnings")
def test_what_gpus_switch_on_works_too(name, hardware_features, tmp_path, tokenizer):
    """Checkpointing and bf16 autocast are off on the CPU profile, and on everywhere else."""
    preset = get_preset(name, **SMALL, **hardware_features)
    make, rows, args = {
        "lora": (SFTTrainer, data.sft_messages, preset.get_sft_config),
        "dpo": (DPOTrainer, data.dpo_preferences, preset.get_dpo_config),
    }[name]
    model = text_model().to(preset.model_kwargs()["dtype"])
    trainer = make(model=model, train_dataset=rows(6), processing_class=tokenizer, **common(preset, tmp_path, args()))
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trainable_parameters_stay_fp32_and_move(kind, tmp_path, tokenizer):
    """At a DPO learning rate nearly all entries move with the preset's callbacks, and most do not without."""
    moved = {}
    for callbacks in (True, False):
        preset = get_preset("qlora", **{**SMALL, "max_steps": 4}, learning_rate=5e-6, lr_scheduler_type="constant")
        preset = preset.replace(warmup_steps=0)
        make, rows, args = {
            "sft": (SFTTrainer, data.sft_messages, preset.get_sft_config),
            "dpo": (DPOTrainer, data.dpo_preferences, preset.get_dpo_config),
        }[kind]
        options = common(preset, tmp_path, args())
        if not callbacks:
            options["callbacks"] = []
        trainer = make(model=nf4_model(tmp_path / "base"), train_dataset=rows(8), processing_class=tokenizer, **options)
        adapters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in adapters.values()} == {torch.float32 if callbacks else torch.bfloat16}
        before = {name: p.detach().clone() for name, p in adapters.items()}
        trainer.train()
        changed = sum((before[name] != p).sum().item() for name, p in adapters.items())
        moved[callbacks] = changed / sum(p.numel() for p in adapters.values())
    assert moved[True] >= 0.99
    assert moved[False] < 0.9


def test_a_later_cast_is_caught_before_training(tmp_path, tokenizer):
    preset = get_preset("lora", **SMALL)
    trainer = SFTTrainer(
        model=text_model(),
        train_dataset=data.sft_messages(6),
        processing_class=tokenizer,
        **common(preset, tmp_path, preset.get_sft_config()),
    )
    trainer.model.bfloat16()
    with pytest.raises(ForgeError, match=r"lora_A.* is trainable and torch\.bfloat16"):
        trainer.train()


def test_full_fine_tuning_of_a_16_bit_checkpoint_gets_fp32_masters(tmp_path, tokenizer):
    preset = get_preset("sft", **SMALL)
    trainer = SFTTrainer(
        model=text_model().bfloat16(),
        train_dataset=data.sft_messages(6),
        processing_class=tokenizer,
        **common(preset, tmp_path, preset.get_sft_config()),
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert get_preset("sft", hardware="ampere", dtype="bfloat16").get_callbacks() == []


def test_fp32_callback_reads_nothing_back_from_the_device(tmp_path, tokenizer, device_reads):
    preset = get_preset("lora", **SMALL)
    trainer = SFTTrainer(
        model=text_model(),
        train_dataset=data.sft_messages(6),
        processing_class=tokenizer,
        **common(preset, tmp_path, preset.get_sft_config()),
    )
    with device_reads() as reads:
        trainer.train()
    reads.assert_none(inside="forge")


def test_packing_is_exact_on_the_cpu_profile(tmp_path, tokenizer):
    """The reason for packing=True being safe with sdpa: packed and padded evaluation give the same loss."""
    found = {}
    for packing in (False, True):
        preset = get_preset("lora", **{**SMALL, "max_length": 256}, packing=packing)
        options = common(preset, tmp_path, preset.get_sft_config())
        trainer = SFTTrainer(
            model=text_model(),
            train_dataset=data.sft_messages(8),
            eval_dataset=data.sft_messages(8),
            processing_class=tokenizer,
            **options,
        )
        rows = list(trainer.get_eval_dataloader())
        with torch.no_grad():
            found[packing] = sum(
                trainer.compute_loss(trainer.model, dict(row)).item() * (row["labels"][:, 1:] != -100).sum().item()
                for row in rows
            )
        assert (len(trainer.train_dataset) < 8) == packing
    assert found[True] == pytest.approx(found[False], rel=1e-6)


def test_a_hand_written_trl_script_gives_the_same_losses(smollm2, conversations, tmp_path):
    """Real weights, fp32, the same values: forge adds nothing of its own to the arithmetic."""
    from datasets import Dataset
    from peft import LoraConfig

    rows = Dataset.from_list([{"messages": chat[:2]} for chat in conversations[:12]])
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def run(args, lora, callbacks, **model_kwargs):
        model = AutoModelForCausalLM.from_pretrained(smollm2, **model_kwargs)
        set_seed(42)  # newer trainers do so themselves before they make the adapter
        args.output_dir, args.save_strategy, args.disable_tqdm = str(tmp_path / "out"), "no", True
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
        trainer.train()
        return losses(trainer)

    from support.models import checkpointing

    by_hand = run(
        SFTConfig(
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_steps=3,
            max_length=64,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            optim="adamw_torch_fused",
            **checkpointing(False),
        ),
        LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        [],
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    preset = get_preset("lora", model=smollm2, **SMALL)
    by_preset = run(preset.get_sft_config(), preset.get_lora_config(), preset.get_callbacks(), **preset.model_kwargs())
    assert by_preset == pytest.approx(by_hand, abs=1e-6)
    assert len(set(by_hand)) == 3
    assert any(a > b for a, b in pairwise(by_hand))
