"""K adapters in one pass train exactly as K separate runs with PEFT, torch's AdamW and transformers' schedules."""

import copy

import pytest
import torch

from forge import get_preset
from forge.errors import UnsupportedError
from forge.freezing.adapters import remove_adapters
from forge.tuning.engines import Task
from forge.tuning.engines.course import Course
from forge.tuning.engines.ground import IGNORED, Row
from forge.tuning.engines.packed.frozen import FrozenPrefix
from forge.tuning.engines.packed.pack import Pack
from forge.tuning.engines.packed.skeleton import Skeleton, frozen_layers
from forge.tuning.engines.packed.slots import Hyper
from support.families import tiny_model
from support.models import nf4_model, text_model

MICRO = 4
# Everything that may differ from slot to slot at once.
TRIALS = (
    {"lora_r": 4, "learning_rate": 1e-2},
    {"lora_r": 16, "learning_rate": 3e-3, "weight_decay": 0.1, "effective_batch_size": 8},
    {"lora_r": 8, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "use_rslora": True, "freeze_ratio": 0.5},
    {
        "lora_r": 2,
        "learning_rate": 5e-3,
        "lora_alpha": 8,
        "max_grad_norm": 0.1,
        "warmup_steps": 0.2,
        "adam_beta2": 0.95,
    },
    {"lora_r": 1, "learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "target_modules": ["q_proj"]},
)


def samples(vocabulary: int, count: int = 48) -> list[Row]:
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 20, (), generator=drawn))
        ids = torch.randint(3, vocabulary, (length,), generator=drawn).tolist()
        rows.append(Row(ids, [IGNORED] * 2 + ids[2:]))
    return rows


def tasks_for(model, *, only=TRIALS) -> list[Task]:
    found = []
    for number, changes in enumerate(only):
        params = {"effective_batch_size": MICRO, "per_device_train_batch_size": MICRO, **changes}
        freeze = params.pop("freeze_ratio", 0.0)
        found.append(Task(number, get_preset("lora", hardware="cpu", model=model, **params), freeze, seed=number))
    return found


def courses_for(tasks, rows, steps: int) -> list[Course]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7)).tolist() * 100
    batches = [int(task.preset.choices["effective_batch_size"].value) for task in tasks]
    return [Course(tuple(order[: steps * batch]), batch, MICRO) for batch in batches]


def train_packed(pack, courses, rows) -> None:
    at = [0] * len(courses)
    while places := [place for place, course in enumerate(courses) if at[place] < course.micro_batches]:
        pack.backward(
            places,
            [[rows[row] for row in courses[place].rows(at[place])] for place in places],
            [sum(rows[row].learnt for row in courses[place].step_rows(at[place])) for place in places],
        )
        if ends := [place for place in places if courses[place].ends_step(at[place])]:
            pack.step(ends)
        for place in places:
            at[place] += 1


def separate(base, task, dtype):
    """The trial alone, as a person would set it up."""
    from peft import get_peft_model

    torch.manual_seed(task.seed)
    model = get_peft_model(base, task.preset.get_lora_config())
    remove_adapters(model, range(frozen_layers(task, base.config.num_hidden_layers)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def loss_of(model, rows, tokens):
    length = max(len(row.input_ids) for row in rows)
    pads = [length - len(row.input_ids) for row in rows]
    ids = torch.tensor([list(row.input_ids) + [0] * pad for row, pad in zip(rows, pads, strict=True)])
    labels = torch.tensor([list(row.labels) + [IGNORED] * pad for row, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * (length - pad) + [0] * pad for pad in pads])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / tokens


def train_alone(model, task, course, rows) -> None:
    from transformers import get_scheduler

    args = task.preset.get_sft_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(course.steps), course.steps)
    for micro in range(course.micro_batches):
        tokens = sum(rows[row].learnt for row in course.step_rows(micro))
        loss_of(model, [rows[row] for row in course.rows(micro)], tokens).backward()
        if course.ends_step(micro):
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def factors_of(model) -> dict[str, tuple]:
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def worst(found, expected, *, relative: bool = False) -> float:
    assert found.keys() == expected.keys()
    differences = []
    for name, pair in expected.items():
        for own, other in zip(found[name], pair, strict=True):
            scale = float(other.detach().abs().max()) if relative else 1.0
            differences.append(float((own - other).detach().abs().max()) / max(scale, 1e-12))
    return max(differences)


def packed(model, tasks, dtype=torch.float32) -> Pack:
    model.requires_grad_(False)
    skeleton, pack = Skeleton(model), Pack(model, dtype=dtype)
    for task in tasks:
        pack.append(skeleton.create(task), Hyper.of(task.preset.get_sft_config(), 60))
    return pack


def test_sixty_steps_in_double_precision_are_those_of_separate_runs():
    base = text_model("llama").double()
    alone = copy.deepcopy(base)
    rows, tasks = samples(base.config.vocab_size), tasks_for(base)
    courses = courses_for(tasks, rows, steps=60)
    pack = packed(base, tasks, torch.float64)
    train_packed(pack, courses, rows)
    moved = []
    for place, (task, course) in enumerate(zip(tasks, courses, strict=True)):
        model = separate(copy.deepcopy(alone), task, torch.float64)
        before = {name: tuple(factor.detach().clone() for factor in pair) for name, pair in factors_of(model).items()}
        train_alone(model, task, course, rows)
        expected = factors_of(model)
        assert worst(pack.adapter(place).factors, expected) <= 1e-7
        moved.append(worst(before, expected))
    assert min(moved) > 1e-3  # there was something to compare


def gradients(pack, tasks, rows) -> list[dict]:
    batch = [rows[:MICRO]] * len(tasks)
    tokens = [sum(row.learnt for row in rows[:MICRO])] * len(tasks)
    pack.backward(range(len(tasks)), batch, tokens)
    slots = pack.slots
    ranks = [
        {name: down.shape[0] for name, (down, _) in pack.adapter(place).factors.items()} for place in range(len(tasks))
    ]
    return [slots.layout.read(slots.grad[place], ranks[place]) for place in range(len(tasks))]


def noisy(pack) -> None:
    """Values for B, which begins at zero: without them only its own gradient would be seen."""
    for place in range(len(pack.adapters)):
        drawn = torch.Generator().manual_seed(place)
        own = pack.adapter(place).factors
        filled = {name: (a, torch.randn(b.shape, generator=drawn) * 0.02) for name, (a, b) in own.items()}
        pack.slots.theta[place] = 0.0
        pack.slots.layout.write(pack.slots.theta[place], filled)


def same_gradients(base, alone, tasks, rows, *, prepare=lambda model: None) -> None:
    pack = packed(base, tasks)
    noisy(pack)
    prepare(base)
    found = gradients(pack, tasks, rows)
    for place, task in enumerate(tasks):
        model = separate(copy.deepcopy(alone), task, torch.float32)
        with torch.no_grad():
            for name, (down, up) in factors_of(model).items():
                own = pack.adapter(place).factors[name]
                down.copy_(own[0])
                up.copy_(own[1])
        loss_of(model, rows[:MICRO], sum(row.learnt for row in rows[:MICRO])).backward()
        expected = {name: (down.grad, up.grad) for name, (down, up) in factors_of(model).items()}
        assert worst(found[place], expected, relative=True) <= 1e-4


SIMPLE = tuple(trial for trial in TRIALS if "target_modules" not in trial)  # which other families name otherwise
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "olmo2", "granite", "gpt_neox", "falcon_7b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_families(family):
    base = tiny_model(family)
    for module in base.modules():  # GPT-2 drops parts of its own layers at random
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    same_gradients(base, copy.deepcopy(base), tasks_for(base, only=SIMPLE), samples(base.config.vocab_size))


def test_gradients_on_nf4(tmp_path):
    base, alone = nf4_model(tmp_path / "one"), nf4_model(tmp_path / "two")
    assert any("4bit" in type(module).__name__ for module in base.modules())
    tasks, rows = tasks_for(base), samples(base.config.vocab_size)
    pack = packed(base, tasks)
    noisy(pack)
    found = gradients(pack, tasks, rows)
    for place, task in enumerate(tasks):
        model = separate(alone, task, torch.float32)
        with torch.no_grad():
            for name, (down, up) in factors_of(model).items():
                down.copy_(pack.adapter(place).factors[name][0])
                up.copy_(pack.adapter(place).factors[name][1])
        loss_of(model, rows[:MICRO], sum(row.learnt for row in rows[:MICRO])).backward()
        expected = {name: (down.grad, up.grad) for name, (down, up) in factors_of(model).items()}
        assert worst(found[place], expected, relative=True) <= 1e-4
        alone = model.unload()
        vars(alone).pop("peft_config", None)  # PEFT 0.18 leaves it


def test_gradients_under_checkpointing():
    from forge.compat import enable_checkpointing

    base = text_model("llama")
    same_gradients(
        base,
        copy.deepcopy(base),
        tasks_for(base),
        samples(base.config.vocab_size),
        prepare=lambda model: enable_checkpointing(model, use_reentrant=False),
    )


@pytest.mark.parametrize("cache", [False, True])
def test_gradients_above_a_frozen_prefix(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    base = text_model("llama")
    tasks = tasks_for(base, only=[{**trial, "freeze_ratio": 0.5} for trial in TRIALS[:4]])
    alone, rows = copy.deepcopy(base), samples(base.config.vocab_size)
    prefix = FrozenPrefix(base, cache=cache, args=tasks[0].preset.get_sft_config())

    def below(model):
        prefix.move(2)
        if cache:  # seen once, read from then on
            pack = packed(model, tasks)
            gradients(pack, tasks, rows)
            gradients(pack, tasks, rows)
            pack.take_out()
            assert prefix._cache.hits >= MICRO

    below(base)
    same_gradients(base, alone, tasks, rows)
    prefix.end()
    assert prefix._cache is None


def test_slots_that_come_and_go_leave_the_others_alone():
    base = text_model("llama").double()
    rows, tasks = samples(base.config.vocab_size), tasks_for(base)
    courses = courses_for(tasks, rows, steps=12)
    whole = packed(copy.deepcopy(base), tasks[:2], torch.float64)
    train_packed(whole, courses[:2], rows)
    skeleton = Skeleton(base)
    pack = packed(base, [tasks[1], tasks[4], tasks[0]], torch.float64)
    half = [Course(course.order[: 6 * course.batch], course.batch, MICRO) for course in courses]
    train_packed(pack, [half[1], half[4], half[0]], rows)
    pack.keep([2, 0])  # in another order, too
    pack.append(skeleton.create(tasks[2]), Hyper.of(tasks[2].preset.get_sft_config(), 60))
    rest = [Course(course.order[6 * course.batch :], course.batch, MICRO) for course in courses]
    train_packed(pack, [rest[0], rest[1], rest[2]], rows)
    assert worst(pack.adapter(0).factors, whole.adapter(0).factors) <= 1e-12
    assert worst(pack.adapter(1).factors, whole.adapter(1).factors) <= 1e-12


def test_a_slot_whose_gradient_is_not_finite_takes_no_step_and_harms_nobody():
    base = text_model("llama")
    rows, tasks = samples(base.config.vocab_size), tasks_for(base, only=TRIALS[:3])
    pack, healthy = packed(copy.deepcopy(base), tasks), packed(base, [tasks[0], tasks[2]])
    batch, tokens = rows[:MICRO], sum(row.learnt for row in rows[:MICRO])
    for step in range(4):
        pack.backward([0, 1, 2], [batch] * 3, [tokens] * 3)
        if step in (1, 2):
            pack.slots.grad[1, 5] = float("nan" if step == 1 else "inf")
        before = pack.slots.theta[1].clone()
        norms = pack.step([0, 1, 2])
        assert bool(torch.isfinite(norms[1])) == (step not in (1, 2))
        assert torch.equal(before, pack.slots.theta[1]) == (step in (0, 1, 2))  # no rate in the first step of a warm-up
        healthy.backward([0, 1], [batch] * 2, [tokens] * 2)
        healthy.step([0, 1])
    assert worst(pack.adapter(0).factors, healthy.adapter(0).factors) <= 1e-6
    assert worst(pack.adapter(2).factors, healthy.adapter(1).factors) <= 1e-6
    assert pack.slots.updates.tolist() == [4, 2, 4]
    assert bool(torch.isfinite(pack.slots.theta).all())


def test_dropout_is_each_slots_own():
    base = text_model("llama")
    rows = samples(base.config.vocab_size)
    dry, wet = ({"lora_r": 4, "learning_rate": 1e-3, "lora_dropout": share} for share in (0.0, 0.5))
    pack = packed(base, tasks_for(base, only=[dry, wet]))
    noisy(pack)
    first, second = (gradients(pack, [None, None], rows) for _ in range(2))
    # Gradients add up: that of the slot without dropout is twice the same, that of the other is not.
    assert worst({name: tuple(2 * one for one in pair) for name, pair in first[0].items()}, second[0]) <= 1e-6
    assert worst({name: tuple(2 * one for one in pair) for name, pair in first[1].items()}, second[1]) > 1e-4


def test_evaluation_is_that_of_each_adapter_without_dropout():
    base = text_model("llama")
    rows = samples(base.config.vocab_size)
    tasks = tasks_for(base, only=[{**trial, "lora_dropout": 0.3} for trial in TRIALS[:3]])
    pack = packed(base, tasks)
    noisy(pack)
    found = pack.evaluate([2, 0], rows[:9])
    for place, total in zip([2, 0], found, strict=True):
        model = separate(text_model("llama"), tasks[place], torch.float32).eval()
        with torch.no_grad():
            for name, (down, up) in factors_of(model).items():
                down.copy_(pack.adapter(place).factors[name][0])
                up.copy_(pack.adapter(place).factors[name][1])
            assert float(loss_of(model, rows[:9], 1)) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_slots_save_as_ordinary_adapters(family, tmp_path):
    from peft import PeftModel

    from support.tokenizer import tiny_tokenizer

    base = tiny_model(family)
    rows, tasks = samples(base.config.vocab_size), tasks_for(base, only=SIMPLE)
    again = copy.deepcopy(base)
    pack = packed(base, tasks)
    noisy(pack)
    skeleton = Skeleton(again)
    for place, task in enumerate(tasks):
        folder = tmp_path / str(place)
        skeleton.save(task, pack.adapter(place), folder, tiny_tokenizer())
        loaded = PeftModel.from_pretrained(copy.deepcopy(again), str(folder))
        with torch.no_grad():
            loss = float(loss_of(loaded.eval(), rows[:5], 1))
        assert loss == pytest.approx(float(pack.evaluate([place], rows[:5])[0]), rel=1e-5)
        assert loaded.peft_config["default"].r == task.preset.choices["lora_r"].value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes, named):
    base = text_model("llama")
    (task,) = tasks_for(base, only=[changes])
    with pytest.raises(UnsupportedError, match=f"(?s){named}.*engine='shared'"):
        Skeleton(base).create(task)
