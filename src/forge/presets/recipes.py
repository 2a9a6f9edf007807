"""The recipes: every value that a preset carries, with the reason for it and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..hardware import Hardware
from ..models import DEFAULT_TARGET_PATTERN, ModelAnatomy
from .batch import Batch
from .choice import Choice
from .method import QUANTIZED, SIXTEEN_OR_32_BIT, Method

LORA = "Hu et al. 2021, arXiv:2106.09685"
QLORA = "Dettmers et al. 2023, arXiv:2305.14314"
REGRET = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"
ALPACA = "Taori et al. 2023, Stanford Alpaca"
TULU2 = "Ivison et al. 2023, Tulu 2, arXiv:2311.10702"
TULU3 = "Lambert et al. 2024, Tulu 3, arXiv:2411.15124"
DPO = "Rafailov et al. 2023, arXiv:2305.18290"
ZEPHYR = "Tunstall et al. 2023, Zephyr, arXiv:2310.16944"
HANDBOOK = "the alignment handbook's zephyr-7b recipes"
RSLORA = "Kalajdzievski 2023, arXiv:2312.03732"
EIGHT_BIT = "Dettmers et al. 2021, arXiv:2110.02861"
MIXED = "Micikevicius et al. 2017, arXiv:1710.03740"
CHECKPOINTING = "Chen et al. 2016, arXiv:1604.06174"

DPO_LEARNING_RATE_LIMIT = 1e-5
LORA_ALPHA, LORA_R = 32, 16
ONE_DEVICE = "this process's device"


@dataclass(frozen=True)
class Setting:
    """What a recipe decides from.

    Args:
        method: what is trained and in which formats.
        hardware: the profile it will run on.
        anatomy: the model, None when it is not known yet.
        batch: how an optimizer step is cut up.
        lora_r: the rank, after the user's overrides.
        lora_alpha: LoRA's alpha, after the user's overrides.
        use_rslora: whether the scale is alpha / sqrt(r).
        own_targets: whether the user names what LoRA adapts.
        own_batch: whether the user decided the effective batch.
        unties: whether the user trains a copy of embeddings that the model shares with its lm_head.
    """

    method: Method
    hardware: Hardware
    anatomy: ModelAnatomy | None
    batch: Batch
    lora_r: int = LORA_R
    lora_alpha: int = LORA_ALPHA
    use_rslora: bool = False
    own_targets: bool = False
    own_batch: bool = False
    unties: bool = False


def recipe(setting: Setting) -> dict[str, Choice]:
    """All values for this setting, in the order in which a person would read them."""
    method = setting.method
    choices = _model(setting)
    if method.precision in QUANTIZED:
        choices |= _quantization(setting)
    if method.use_peft:
        choices |= _lora(setting)
    choices |= {"learning_rate": _learning_rate(setting)} | _schedule(setting) | _batch(setting) | _machine(setting)
    choices |= _dpo(setting) if method.objective == "dpo" else _sft(setting)
    return choices


def _model(setting: Setting) -> dict[str, Choice]:
    method, hardware = setting.method, setting.hardware
    decided_by_hardware = SIXTEEN_OR_32_BIT.get(method.precision) == hardware.compute_dtype
    if not method.use_peft:
        dtype = Choice(
            "float32",
            "fp32 master weights: in 16 bits most updates are smaller than the rounding of the weight they change",
            MIXED,
        )
    else:
        dtype = Choice(
            SIXTEEN_OR_32_BIT.get(method.precision, method.compute_dtype),
            "what is frozen needs no fp32 copy; the adapters themselves stay fp32",
            QLORA,
            hardware.rule if decided_by_hardware or method.quantized else "",
        )
    sdpa = not setting.anatomy or setting.anatomy.supports_sdpa
    place = "every parameter on this process's one device: what spreads a model over several cannot be trained by DDP"
    return {
        "precision": Choice(
            method.precision,
            "of the base weights" if method.use_peft else "of the matrix products; the weights themselves are fp32",
            QLORA if method.quantized else "",
            hardware.rule if decided_by_hardware else "",
        ),
        "use_peft": Choice(
            method.use_peft, "LoRA adapters are trained" if method.use_peft else "all weights are trained"
        ),
        "dtype": dtype,
        "attn_implementation": Choice(
            hardware.attn_implementation,
            "exact, in torch itself, with a fused kernel on every profile; flash kernels are separate packages",
            "torch.nn.functional.scaled_dot_product_attention",
        )
        if sdpa
        else Choice("eager", "transformers has no scaled_dot_product_attention for this model", "its _supports_sdpa"),
        "device_map": Choice(ONE_DEVICE, place, "", f"device {hardware.device}"),
    }


def _quantization(setting: Setting) -> dict[str, Choice]:
    method = setting.method
    if method.precision == "int8":
        return {
            "load_in_8bit": Choice(True, "LLM.int8(): outliers in 16 bits", "Dettmers et al. 2022, arXiv:2208.07339")
        }
    why = "NF4's levels are the quantiles of a normal distribution, which trained weights resemble"
    return {
        "load_in_4bit": Choice(True, "the base is frozen, so that 4 bits of storage are enough", QLORA),
        "bnb_4bit_quant_type": Choice(
            method.precision, why if method.precision == "nf4" else "a 4-bit float; the paper finds NF4 better", QLORA
        ),
        "bnb_4bit_use_double_quant": Choice(
            True, "quantises the scales too: 0.37 bits per parameter less, without measurable loss", QLORA
        ),
        "bnb_4bit_compute_dtype": Choice(
            method.compute_dtype, "what the 4-bit weights are unpacked to", QLORA, setting.hardware.rule
        ),
    }


def _lora(setting: Setting) -> dict[str, Choice]:
    choices = {
        "lora_r": Choice(LORA_R, "room for instruction data of ordinary size; more costs memory", REGRET),
        "lora_alpha": _lora_alpha(setting),
        "lora_dropout": Choice(0.0, "PEFT adapts fused experts only at 0; raise it if a small data set is overfitted"),
        "task_type": Choice("CAUSAL_LM", "the adapter file says what it is for", "peft.TaskType"),
        "bias": Choice("none", "trained biases change the base itself, also with the adapter switched off", LORA),
    }
    if setting.unties:
        why = "the model shares its embeddings with lm_head; without this the trained copy would come apart from them"
        choices["ensure_weight_tying"] = Choice(True, why, "peft.LoraConfig")
    anatomy = setting.anatomy
    if setting.own_targets:
        transposed = bool(anatomy and anatomy.targets.fan_in_fan_out)
        targets: dict[str, Any] = {"fan_in_fan_out": True} if transposed else {}
        why = "GPT-2's Conv1D stores its weight transposed"
    elif anatomy:
        targets = anatomy.targets.lora_kwargs(quantized=setting.method.quantized)
        why = f"every linear layer of the language decoder of this {anatomy.model_type}; no router, tower or lm_head"
        if anatomy.targets.bypassed:
            why += f"; left out, since a kernel reads their weights directly: {', '.join(anatomy.targets.bypassed)}"
    else:
        targets = {"target_modules": DEFAULT_TARGET_PATTERN}
        why = (
            "every linear layer of the decoder, by the names that the known families use; get_preset(..., model=...) "
            "makes it exact and covers fused experts"
        )
    return choices | {name: Choice(value, why, f"{QLORA}, figure 2; {REGRET}") for name, value in targets.items()}


def _lora_alpha(setting: Setting) -> Choice:
    r, alpha = setting.lora_r, setting.lora_alpha
    if setting.use_rslora:
        why = f"with rank-stabilised scaling the update is scaled by alpha/sqrt(r) = {alpha / r**0.5:g}, whatever r is"
        return Choice(LORA_ALPHA, why, RSLORA)
    why = f"held when r changes: the update is scaled by alpha/r = {alpha / r:g}, and with 1/r scaling"
    return Choice(LORA_ALPHA, f"{why} the best learning rate hardly depends on r", REGRET)


def _learning_rate(setting: Setting) -> Choice:
    billions = setting.anatomy.num_parameters / 1e9 if setting.anatomy else 0
    size = f"{billions:.2g}B parameters" if billions else "size unknown: no model given"
    if setting.method.objective == "dpo":
        return _dpo_rate(setting.method)
    return _adapter_rate(billions, size) if setting.method.use_peft else _full_rate(billions, size)


def _dpo_rate(method: Method) -> Choice:
    if method.use_peft:
        why = "DPO moves a finished model a little; adapters take ten times a full model's rate"
        return Choice(5e-6, why, HANDBOOK)
    why = "DPO moves a finished model a little; above 1e-5 the policy runs away from its reference"
    return Choice(5e-7, why, ZEPHYR)


def _adapter_rate(billions: float, size: str) -> Choice:
    # Named sizes are rounded: "13B" is 13.02e9 parameters.
    if billions > 13.5:
        return Choice(1e-4, f"half, above 13B ({size})", f"{QLORA}, table 9 (33B and 65B)")
    return Choice(2e-4, f"about ten times a full model's rate ({size})", f"{QLORA}, table 9 (7B and 13B); {REGRET}")


def _full_rate(billions: float, size: str) -> Choice:
    if billions > 40:
        return Choice(5e-6, f"between the published rates for 70B, 1e-5 and 2e-6 ({size})", f"{TULU2}; {TULU3}")
    if billions > 10:
        return Choice(1e-5, f"half, above 10B ({size})", f"{ALPACA} (13B)")
    return Choice(2e-5, f"the common rate for all weights; it falls with size ({size})", f"{ALPACA} (7B); {TULU2} (7B)")


def _schedule(setting: Setting) -> dict[str, Choice]:
    dpo = setting.method.objective == "dpo"
    return {
        "lr_scheduler_type": Choice(
            "cosine", "ends near zero, so that the last weights are the good ones", HANDBOOK if dpo else ALPACA
        ),
        "warmup_steps": Choice(
            0.03, "3% of all steps: Adam's second moments settle before the rate is high", "" if dpo else ALPACA
        ),
        "num_train_epochs": Choice(
            1 if dpo else 3,
            "preferences are overfitted within a few passes" if dpo else "small instruction sets need several passes",
            HANDBOOK if dpo else ALPACA,
        ),
        "logging_steps": Choice(10, "a line every few minutes, whatever the model", "TRL's default"),
        "report_to": Choice("none", "nothing leaves the machine unless asked", "transformers' default"),
    }


def _batch(setting: Setting) -> dict[str, Choice]:
    batch = setting.batch
    sum_ = f"micro-batch x accumulation x world size: {batch}"
    source = "" if setting.own_batch or setting.method.objective == "dpo" else f"{QLORA}, table 9 (7B and 13B)"
    return {
        "effective_batch_size": Choice(batch.effective, sum_, source, overridden=setting.own_batch),
        "per_device_train_batch_size": Choice(batch.micro, sum_),
        "gradient_accumulation_steps": Choice(batch.accumulation, sum_),
        "world_size": Choice(batch.world_size, "processes, from WORLD_SIZE as torchrun and accelerate set it"),
    }


def _machine(setting: Setting) -> dict[str, Choice]:
    hardware, method = setting.hardware, setting.method
    cuda = hardware.device == "cuda"
    paged = cuda and method.quantized
    choices = {
        "optim": Choice(
            "paged_adamw_8bit" if paged else "adamw_torch_fused",
            "8-bit moments, which move to the host when memory runs out"
            if paged
            else "AdamW as published, in one kernel",
            f"{EIGHT_BIT}; {QLORA}, section 3 (paging)" if paged else "torch.optim.AdamW(fused=True)",
            "paged and 8-bit optimizers exist on CUDA only" if method.quantized else "",
        ),
        "bf16": Choice(method.autocast == "bf16", "autocast of the matrix products", MIXED, hardware.rule),
        "fp16": Choice(method.autocast == "fp16", "autocast with loss scaling", MIXED, hardware.rule),
        "use_cpu": Choice(not cuda, "the profile's device", "", f"profile {hardware.name}"),
        "activation_checkpointing": Choice(
            cuda,
            "activations are recomputed in backward: about a third more time for the largest part of the memory"
            if cuda
            else "a CPU has memory to spare and no time",
            CHECKPOINTING,
            f"device {hardware.device}",
        ),
    }
    if cuda:
        choices["activation_checkpointing_kwargs"] = _checkpointing_kind(method)
    if hardware.tf32:
        choices["tf32"] = Choice(
            True, "what remains in fp32 runs on tensor cores", "NVIDIA A100 whitepaper", hardware.rule
        )
    return choices


def _checkpointing_kind(method: Method) -> Choice:
    if method.precision == "int8":
        why = "bitsandbytes' int8 layers keep their inputs where the other kind does not free them"
        return Choice({"use_reentrant": True}, why, "bitsandbytes, MatMul8bitLt; benchmarks/int8_checkpointing.py")
    why = "works with frozen inputs, and is what torch recommends"
    return Choice({"use_reentrant": False}, why, "torch.utils.checkpoint")


def _max_length(setting: Setting, preferred: int) -> Choice:
    limit = setting.anatomy.max_position_embeddings if setting.anatomy else None
    if limit and limit < preferred:
        return Choice(limit, f"the longest that this model was made for (max_position_embeddings={limit})")
    return Choice(preferred, "covers most conversations; memory and time grow with it", "")


def _sft(setting: Setting) -> dict[str, Choice]:
    return {
        "max_length": _max_length(setting, 2048),
        "packing": Choice(
            False,
            "a batch of 16 means 16 samples, which the learning rate was tuned for; packed, it is 16 full rows and "
            "a small set gives few steps. For many short samples set packing=True: under SFTTrainer, sdpa keeps them "
            "apart",
            "TRL, Reducing Memory Usage",
        ),
    }


def _dpo(setting: Setting) -> dict[str, Choice]:
    choices: dict[str, Any] = {
        "max_length": _max_length(setting, 1024),
        "beta": Choice(0.1, "how hard the policy is held to its reference", f"{DPO}; {ZEPHYR}"),
    }
    if not setting.method.use_peft:
        # With adapters TRL needs no copy: it switches them off. Without, the copy is as large as the model.
        choices["precompute_ref_log_probs"] = Choice(
            True, "the reference's log-probabilities are computed once, then no second model is kept", "TRL, DPOConfig"
        )
    return choices
