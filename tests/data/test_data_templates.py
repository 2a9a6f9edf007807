"""What is learnt of a conversation, for the templates of the families and those that no one can mask."""

import pytest
from chat_families import (
    ENDLESS,
    OWN,
    REASONING,
    STOPS,
    UNPROVABLE,
    assistant,
    bundled,
    family_of,
    learnt_text,
    own,
    system,
    user,
    with_template,
)
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel

from forge import ConflictError, ForgeError
from forge.compat import training_chat_template
from forge.data import encode_prompt, pad_token_id, prepare_dataset, stop_token_ids
from forge.data.choose import by_prefix, by_training_template, choose_template
from forge.data.marked import marked_answers, runs
from forge.data.template import ChatTemplate
from forge.data.tokens import TemplateRefusalError
from forge.errors import UnsupportedError
from support.tokenizer import tiny_tokenizer

CONVERSATIONS = {
    "single": [user("Hi"), assistant("Hello.")],
    "multi": [user("Hi"), assistant("Hello."), user("And?"), assistant("Then\n\nmore.\n"), user("x"), assistant("y")],
    "system": [system("Be kind."), user("Hi"), assistant("Hello."), user("a"), assistant("b")],
    "unicode": [user("héllo 你好 🦊"), assistant("  ñ🦊 你\n"), user("\u2028"), assistant("🦊")],
    "nearly empty": [user(" "), assistant(" . "), user(""), assistant("-")],
}
# TRL's rewriting of these says something else than they do in earlier turns: they drop the reasoning there.
REWRITTEN = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
# These do not keep the promise that finding answers rests on; only TRL's markers tell where they are.
MARKERS_ONLY = {"deepseek_r1_distill", "deepseekv3", "glm4moe"} | {
    f"nemotron_3_{kind}" for kind in ("5_lightning", "nano", "super", "ultra")
}
# Of vision models, whose templates take no content that is text.
PARTS_ONLY = {"idefics3", "smolvlm", "llava_next"}
BUNDLED = bundled()
OWN_BEGINNING = {"<s>", "<|begin_of_text|>", "<bos>"}


def outcome(template, messages):
    try:
        found = template.encode(messages)
    except TemplateRefusalError as error:
        return type(error).__name__, str(error)
    return found.ids, [bool(mark) for mark in found.learnt]


@pytest.mark.parametrize("name", sorted(set(BUNDLED) - REWRITTEN - MARKERS_ONLY - PARTS_ONLY))
def test_finding_answers_equals_trls_markers(name):
    """Token for token, once what TRL marks of the generation prompt and after the end is taken off."""
    tokenizer = with_template(BUNDLED[name], family_of(name))
    training = training_chat_template(tokenizer)
    found = by_prefix(tokenizer)
    if training is None:  # TRL has none for it
        found, stop = choose_template(tokenizer), {tokenizer.convert_ids_to_tokens(end) for end in found.ends}
        for messages in (CONVERSATIONS["multi"], CONVERSATIONS["system"]):
            row = found.encode(messages)
            labels = [token if mark else -100 for token, mark in zip(row.ids, row.learnt, strict=True)]
            said = [text.rstrip() for text in learnt_text(tokenizer, row.ids, labels)]
            answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
            assert [any(text == answer + end for end in stop) for text, answer in zip(said, answers, strict=True)]
            assert all(text.endswith(tuple(stop)) for text in said)
        return
    marked = ChatTemplate(tokenizer, training, "TRL", found.ends, marked=True)
    assert not by_training_template(tokenizer, training).marked
    refused = 0
    for messages in CONVERSATIONS.values():
        left, right = outcome(found, messages), outcome(marked, messages)
        assert left == right
        refused += isinstance(left[0], str)
    assert refused <= 1  # Gemma's: no system message


@pytest.mark.parametrize("name", sorted(REWRITTEN & set(BUNDLED)))
def test_templates_that_rewrite_history(name):
    """Alone, only the last answer can be learnt; with TRL's training template all can, thoughts included."""
    tokenizer = with_template(BUNDLED[name])
    alone, known = by_prefix(tokenizer), choose_template(tokenizer)
    assert (alone.every_turn, known.origin, known.marked) == (False, "TRL", False)
    assert outcome(alone, CONVERSATIONS["single"]) == outcome(known, CONVERSATIONS["single"])
    assert alone.encode(CONVERSATIONS["multi"]).unlearnt_turns == 2
    assert known.encode(CONVERSATIONS["multi"]).unlearnt_turns == 0
    assert "reasoning" in known.notes[0]


@pytest.mark.parametrize("name", sorted(MARKERS_ONLY & set(BUNDLED)))
def test_templates_that_only_markers_can_mask(name):
    tokenizer = with_template(BUNDLED[name], family_of(name))
    with pytest.raises(UnsupportedError, match=r"chat_template"):
        by_prefix(tokenizer)
    chosen = choose_template(tokenizer)
    assert chosen.marked == (name != "glm4moe")  # whose training template ends the last answer as well
    found = chosen.encode(CONVERSATIONS["multi"])
    labels = [token if mark else -100 for token, mark in zip(found.ids, found.learnt, strict=True)]
    said = learnt_text(tokenizer, found.ids, labels)
    assert len(said) == 3
    for text, message in zip(said, CONVERSATIONS["multi"][1::2], strict=True):
        assert message["content"].strip() in text
        assert "ssistant" not in text  # the header is the prompt's


@pytest.mark.parametrize("name", sorted(PARTS_ONLY & set(BUNDLED)))
def test_templates_of_vision_models_are_refused(name):
    with pytest.raises(UnsupportedError, match="chat template"):
        choose_template(with_template(BUNDLED[name]))


@pytest.mark.parametrize("name", sorted(OWN))
def test_families(name):
    """One beginning, every answer learnt through its stop token, nothing else; refusals name the row."""
    tokenizer, stop = own(name), STOPS[name]
    rows = [{"messages": CONVERSATIONS["multi"]}, {"messages": CONVERSATIONS["unicode"]}]
    data = prepare_dataset(rows, tokenizer)
    for row, conversation in zip(data.train, rows, strict=True):
        ids = row["input_ids"]
        begins = 1 if tokenizer.bos_token in OWN_BEGINNING else None
        if name == "llama2":  # the format repeats it before each question
            begins = len(conversation["messages"]) // 2
        assert begins is None or ids.count(tokenizer.bos_token_id) == begins
        said = learnt_text(tokenizer, ids, row["labels"])
        answers = conversation["messages"][1::2]
        assert [text.removesuffix(stop).strip() for text in said] == [m["content"].strip() for m in answers]
        assert all(text.endswith(stop) for text in said)
        prompt = encode_prompt(tokenizer, conversation["messages"][:1])
        assert ids[: len(prompt)] == prompt
    assert data.report.stop_tokens == (stop,)
    assert tokenizer.convert_tokens_to_ids(stop) in stop_token_ids(tokenizer)
    assert bool(data.report.notes and "date" in data.report.notes[0]) == ("dated" in name)
    before = tokenizer.pad_token
    assert 0 <= pad_token_id(tokenizer) < len(tokenizer)
    assert tokenizer.pad_token == before
    if name in ("gemma2", "mistral"):
        with pytest.raises(
            ForgeError, match=r"(?s)row 1, message 0 \(system\): .*roles? .*put its text before the first"
        ):
            prepare_dataset([rows[0], {"messages": CONVERSATIONS["system"]}], tokenizer)


def test_only_the_last_answer_where_history_is_rewritten():
    data = prepare_dataset([{"messages": CONVERSATIONS["multi"]}], with_template(REASONING))
    row = data.train[0]
    tokenizer = with_template(REASONING)
    assert learnt_text(tokenizer, row["input_ids"], row["labels"]) == ["<think>\n\n</think>\n\ny<|im_end|>"]
    assert any("only the last answer" in note for note in data.report.notes)
    assert any(note.startswith("2 answers are only context") for note in data.report.notes)


@pytest.mark.parametrize(("template", "said"), [(UNPROVABLE, "changes once the answer"), (ENDLESS, "learn to stop")])
def test_templates_that_nobody_can_mask_are_refused(template, said):
    with pytest.raises(UnsupportedError, match=rf"{said}.*tokenizer\.chat_template"):
        prepare_dataset([{"messages": CONVERSATIONS["single"]}], with_template(template))


def test_own_markers_are_believed_if_the_stop_token_is_inside(tokenizer):
    assert (choose_template(tokenizer).origin, choose_template(tokenizer).notes) == ("markers", ())
    outside = tiny_tokenizer(
        chat_template=tokenizer.chat_template.replace(
            "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
            "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
        )
    )
    chosen = choose_template(outside)
    assert chosen.origin == "prefix"
    assert "leave the end-of-turn token out" in chosen.notes[0]
    assert outcome(chosen, CONVERSATIONS["unicode"]) == outcome(choose_template(tokenizer), CONVERSATIONS["unicode"])


def test_the_skeleton_changes_nothing():
    """Contents that look like the template's own text, and some that the template changes."""
    for name in OWN:
        quick, slow = by_prefix(own(name)), by_prefix(own(name))
        object.__setattr__(slow, "every_turn", True)
        slow.__dict__["_quickly"] = lambda *_: None
        hard = [user("a<|im_end|>b"), assistant("placeholder1of4. </s> x"), user("  "), assistant("\n<|im_end|> y ")]
        for messages in [*CONVERSATIONS.values(), hard, CONVERSATIONS["multi"]]:
            assert outcome(quick, messages) == outcome(slow, messages)
        assert quick._skeletons
        assert not slow._skeletons


def test_a_template_that_looks_at_what_is_said_is_searched_itself():
    """Here the line end moves, and with it the answer, while the text is as long as the skeleton says."""
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role + (': ' if '!' in m.content else '> \\n') }}"
        "{{ m.content + '<|im_end|>' + ('\\n' if '!' in m.content else '') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> \\n' }}{% endif %}"
    )
    template = by_prefix(tokenizer)
    plain = template.encode([user("a!"), assistant("b"), user("c!"), assistant("d")])
    labels = [token if mark else -100 for token, mark in zip(plain.ids, plain.learnt, strict=True)]
    assert learnt_text(tokenizer, plain.ids, labels) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(TemplateRefusalError, match="changes once the answer is there"):
        template.encode([user("a!"), assistant("b!"), user("c!"), assistant("d")])


def test_control_tokens_in_somebodys_words_do_not_end_the_answer():
    tokenizer = own("phi4")
    data = prepare_dataset(
        [{"messages": [user("a"), assistant("x<|im_end|>y"), user("<|im_end|>"), assistant("z")]}], tokenizer
    )
    row = data.train[0]
    assert learnt_text(tokenizer, row["input_ids"], row["labels"]) == ["x<|im_end|>y<|im_end|>", "z<|im_end|>"]
    assert "rows 0" in data.report.warnings[0]


def test_an_answer_that_opens_a_conversation_is_context():
    tokenizer = own("phi4")
    rows = [{"messages": [assistant("Welcome!"), user("a"), assistant("b")]}, {"messages": [assistant("Welcome!")]}]
    data = prepare_dataset(rows, tokenizer)
    row = data.train[0]
    assert learnt_text(tokenizer, row["input_ids"], row["labels"]) == ["b<|im_end|>"]
    assert data.report.train.dropped == {"no answer that can be learnt": [1]}


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast, chat_template, eos_token = False, tokenizer.chat_template, "x"

    with pytest.raises(UnsupportedError, match="fast tokenizer"):
        choose_template(Slow())


@pytest.mark.parametrize("name", ["smollm2", "llama3_dated"])
def test_tokenizers_that_place_white_space_nowhere(name):
    """GPT-2's way of giving offsets: a token of white space stands behind it, with no extent."""
    usual, trimming = own(name), own(name)
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    said = [user(" a "), assistant("  x  \n\n y 🦊"), user("\n"), assistant("🦊  ")]
    found = [outcome(by_prefix(tokenizer), said) for tokenizer in (usual, trimming)]
    assert found[0] == found[1]
    for row in ({"text": "  a  \n b  "}, {"prompt": "a  b\n", "completion": "  c  \n d"}):
        for tokenizer in (usual, trimming):
            tokenizer.chat_template = None
        rows = [prepare_dataset([row], tokenizer).train[0] for tokenizer in (usual, trimming)]
        assert rows[0]["labels"] == rows[1]["labels"]
        assert trimming.decode([label for label in rows[1]["labels"] if label != -100]).startswith(
            ("  c", " a  \n b  ")
        )


def test_marks_cover_the_whole_last_character():
    """transformers' masks stop after the first byte of a character; the end-of-turn token is outside these markers."""
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ m.role + ':' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    ids, marked = marked_answers(tokenizer, [assistant("a 🦊")], None, None, None)
    assert tokenizer.decode([token for token, mark in zip(ids, marked, strict=True) if mark]) == "a 🦊"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASSISTED = [
    user("Will it rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "12"},
    assistant("It will."),
    user("Thanks"),
    assistant("Welcome."),
]


def labelled(template, messages):
    found = template.encode(messages, 1)
    labels = [token if mark else -100 for token, mark in zip(found.ids, found.learnt, strict=True)]
    return learnt_text(template.tokenizer, found.ids, labels), found


@pytest.mark.skipif("glm4moe" not in BUNDLED, reason="this TRL ships no templates")
@pytest.mark.parametrize(
    ("name", "writes_calls"),
    [("gptoss", True), ("glm4moe", True), ("qwen2_5", True), ("qwen3", True), ("llama3", False)],
)
def test_between_tools_what_is_learnt_is_what_trl_marks(name, writes_calls):
    """Without the header at its beginning and the white space at its end; and without calls that are not written."""
    tokenizer = with_template(BUNDLED[name], family_of(name))
    training = training_chat_template(tokenizer)
    said, found = labelled(choose_template(tokenizer), ASSISTED)
    ids, marked = marked_answers(tokenizer, ASSISTED, training, None, None)
    assert found.ids == ids
    assert all(mark for mark, learnt in zip(marked, found.learnt, strict=True) if learnt)
    turns = runs(marked)
    assert len(turns) == 3
    missed = 0
    for start, end in turns:
        learnt = [index for index in range(start, end) if found.learnt[index]]
        if not learnt:
            missed += 1
            continue
        assert learnt == list(range(learnt[0], learnt[-1] + 1))
        assert not tokenizer.decode(ids[learnt[-1] + 1 : end]).strip()
        header = encode_prompt(tokenizer, ASSISTED[:1])[-(learnt[0] - start) :] if learnt[0] > start else []
        assert ids[start : learnt[0]] == header
    assert missed == found.unlearnt_turns == (not writes_calls)
    assert found.unwritten == (not writes_calls)
    assert ["weather" in text for text in said] == [True, False, False][not writes_calls :]


# Closes an answer only after the results of the tools that it calls; these are too short to be told by their text.
FOLDED = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<result>' + m.content + '</result><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
    "{% if not m.tool_calls %}{{ '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_an_answer_ends_before_the_next_message_or_is_context():
    said, found = labelled(by_prefix(with_template(FOLDED)), ASSISTED)
    assert said == ["It will.<|im_end|>", "Welcome.<|im_end|>"]
    assert found.unlearnt_turns == 1


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_calls_that_the_template_leaves_out_are_not_learnt(content):
    """With markers of its own or found: neither an end token alone, nor a text whose call is missing."""
    messages = [ASSISTED[0], {**ASSISTED[1], "content": content}, *ASSISTED[2:]]
    for tokenizer in (own("smollm2"), tiny_tokenizer()):
        said, found = labelled(choose_template(tokenizer), messages)
        assert said == ["It will.<|im_end|>", "Welcome.<|im_end|>"]
        assert found.unlearnt_turns == 1
        assert found.unwritten == 1


def test_thoughts_with_other_white_space_are_what_was_said():
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if '</think>' in m.content %}"
        "{{ '<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '\\n</think>\\n\\n' "
        "+ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    said, found = labelled(by_prefix(tokenizer), [user("q"), assistant("<think>x</think>y")])
    assert said == ["<think>\nx\n</think>\n\ny<|im_end|>"]
    assert found.unwritten == 0


def test_warnings_name_the_rows_that_lose_something():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    plain = {"messages": [user("Hi"), assistant("Hello.")]}
    rows = [plain, {"messages": ASSISTED}, {"messages": [user("a"), assistant("b")], "tools": tools}]
    warnings = prepare_dataset(rows, own("smollm2")).report.warnings
    assert [text.rpartition("(")[2] for text in warnings] == ["rows 1)", "rows 2)"]
    assert "does not write all that is said in 1 row " in warnings[0]
    assert "nothing of the tools of 1 row," in warnings[1]
    assert not prepare_dataset([plain], own("smollm2")).report.warnings


@pytest.mark.skipif("qwen2_5" not in BUNDLED, reason="this TRL ships no templates")
def test_tools_that_are_written_are_no_warning():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    rows = [{"messages": [user("a"), assistant("b")], "tools": tools}]
    assert not prepare_dataset(rows, with_template(BUNDLED["qwen2_5"], "qwen")).report.warnings


@pytest.mark.parametrize(
    ("name", "mention"),
    [
        ("llama2", "<s>strike</s> is deprecated, why?"),
        ("smollm2", "<|im_start|> means what?"),
        ("llama3_dated", "<|begin_of_text|> is what?"),
        ("phi4", "<|im_start|> and <|im_sep|>?"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_prompts_are_rendered_if_they_begin_or_end_as_the_template_does(name, mention, column):
    tokenizer = own(name)
    answer = "completion" if column == "prompt" else "output"
    data = prepare_dataset([{column: text, answer: "a"} for text in (mention, "Plain?")], tokenizer)
    assert not any("taken as they are" in note for note in data.report.notes)
    assert any("somebody's words" in warning and "rows 0" in warning for warning in data.report.warnings)
    rendered = tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True)
    given = tokenizer.apply_chat_template([system("Be kind."), user("q")], tokenize=False)
    bare = rendered.removeprefix(tokenizer.bos_token or "")
    for texts in ([rendered], [given], [bare], [rendered, given]):
        data = prepare_dataset([{column: text, answer: "a"} for text in texts], tokenizer)
        assert any("taken as they are" in note for note in data.report.notes)
    with pytest.raises(ConflictError, match="the others do not"):
        prepare_dataset([{column: text, answer: "a"} for text in (rendered, "Plain?")], tokenizer)


def test_reasoning_is_no_control_token():
    tokenizer = own("smollm2")
    tokenizer.add_tokens(["<think>", "</think>"])
    rows = [{"prompt": f"<think> first, {i}.", "completion": "<think>a</think>b"} for i in range(2)]
    report = prepare_dataset([*rows, {"prompt": "Plain?", "completion": "c"}], tokenizer).report
    assert report.warnings == ()


def test_own_markers_and_offsets_without_white_space():
    """transformers cannot mark an answer that begins with a space there: that row is searched instead."""
    usual, trimming = tiny_tokenizer(), tiny_tokenizer()
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = [user("q"), assistant(" a"), user("r"), assistant("b")]
    assert choose_template(trimming).origin == "markers"
    found = [labelled(choose_template(tokenizer), messages) for tokenizer in (usual, trimming)]
    assert found[0] == found[1]
    assert found[0][0] == [" a<|im_end|>", "b<|im_end|>"]


def test_a_header_that_swallows_white_space_is_not_learnt_between_markers():
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokens = [AddedToken(text, rstrip=True, special=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    template = choose_template(tokenizer)
    assert template.marked
    said, found = labelled(template, [user("q"), assistant("\n Hello")])
    assert said == ["Hello<|end|>"]
    assert found.unlearnt_turns == 0


@pytest.mark.skipif("deepseekv3" not in BUNDLED, reason="this TRL ships no templates")
def test_an_answer_before_a_system_message_that_moves_is_context():
    tokenizer = with_template(BUNDLED["deepseekv3"], "deepseek")
    said, found = labelled(
        choose_template(tokenizer), [user("a"), assistant("b"), system("MIDDLE"), user("c"), assistant("d")]
    )
    assert found.unlearnt_turns == 1
    assert len(said) == 1
    assert said[0].startswith("d")


@pytest.mark.parametrize("said", ["end", "im_end", "assistant", "think"])
def test_words_that_control_tokens_are_spelled_with_do_not_matter(said):
    messages = [user("q"), assistant("a"), user(said), assistant("b")]
    for tokenizer in (own("smollm2"), tiny_tokenizer()):
        template = choose_template(tokenizer)
        assert labelled(template, messages)[0] == ["a<|im_end|>", "b<|im_end|>"]
        named = [{**message, "name": "x"} for message in messages]  # which no skeleton fits
        assert labelled(template, named)[0] == ["a<|im_end|>", "b<|im_end|>"]
