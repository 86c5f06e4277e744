"""The quickstart itself: load the shipped model in 4 bits, examine it, teach it with LoRA, examine it again.

It is written as a user would write it, with nothing but the public interface.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustune import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from rustune.quickstart.instruct import Example, held_out_set, training_set
from rustune.quickstart.plot import loss_curve
from rustune.quickstart.world import make_world

MODEL = Path(__file__).parent / "model"
GOAL = 0.9
_TRAIN_QUESTIONS = 3000
_EXAM_QUESTIONS = 300
_LONGEST_ANSWER = 16  # tokens; the longest right answer has 14


@dataclass(frozen=True)
class Outcome:
    """What the quickstart found.

    Attributes:
        before: Share of held-out questions the base model answers exactly.
        after: The same, after fine-tuning, from the adapter as it was saved and loaded again.
        commonest: The share that always giving the commonest answer would get.
        train_seconds: How long training took.
    """

    before: float
    after: float
    commonest: float
    train_seconds: float

    @property
    def passed(self) -> bool:
        """Whether fine-tuning taught the model what it could not do."""
        return self.after >= GOAL and max(self.before, self.commonest) <= 1 - GOAL


def run(out: Path, *, seed: int = 3407) -> Outcome:
    """Runs the quickstart and prints what it does.

    Args:
        out: A folder for the adapter and the picture; made if it is not there.
        seed: Of the adapter's first weights and the order of rows.

    Returns:
        The scores. Nothing is fetched from anywhere.

    Raises:
        RustuneError: If the package's model cannot be read or `out` cannot be written.
    """
    world = make_world()
    exam = held_out_set(world, _EXAM_QUESTIONS)
    commonest, times = Counter(example.answer for example in exam).most_common(1)[0]

    print("1. Load the shipped model in 4 bits")
    model, tokenizer = FastLanguageModel.from_pretrained(str(MODEL), max_seq_length=128, load_in_4bit=True)

    print(f"2. Ask {len(exam)} questions whose subjects no training question mentions")
    before, _ = examine(model, tokenizer, exam)
    print(f"   exact match of the base model: {before:.3f}; of always saying {commonest!r}: {times / len(exam):.3f}")

    print("3. Fine-tune with LoRA")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=seed)
    trainer = train_on_responses_only(
        SFTTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=[{"messages": example.messages()} for example in training_set(world, _TRAIN_QUESTIONS)],
            args=SFTConfig(
                output_dir=str(out / "checkpoints"),
                per_device_train_batch_size=16,
                gradient_accumulation_steps=1,
                num_train_epochs=4,
                learning_rate=3e-3,
                lr_scheduler_type="linear",
                warmup_steps=10,
                weight_decay=0.0,
                logging_steps=10,
                save_strategy="no",
                seed=seed,
            ),
        )
    )
    started = time.monotonic()
    trainer.train()
    train_seconds = time.monotonic() - started
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "loss.png"
    loss_curve(
        picture,
        [entry["loss"] for entry in logs],
        steps=[entry["step"] for entry in logs],
        title="rustune quickstart: LoRA on a 4-bit base",
    )
    print(f"   {trainer.state.global_step} steps in {train_seconds:.0f} s; the loss curve is in {picture}")

    print("4. Save the adapter and load it again")
    adapter = out / "adapter"
    model.save_pretrained(str(adapter))
    tokenizer.save_pretrained(str(adapter))
    model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), max_seq_length=128, load_in_4bit=True)

    print("5. Ask the same questions again")
    after, answers = examine(model, tokenizer, exam)
    for example, answer in list(zip(exam, answers, strict=True))[:5]:
        print(f"   {example.question}  ->  {answer}{'' if answer == example.answer else f'  (not {example.answer})'}")
    outcome = Outcome(before, after, times / len(exam), train_seconds)
    print(f"   exact match: {before:.3f} before, {after:.3f} after: {'passed' if outcome.passed else 'FAILED'}")
    return outcome


def examine(model: Any, tokenizer: Any, exam: Sequence[Example], *, batch: int = 50) -> tuple[float, list[str]]:
    """Asks every question through the chat template and takes the likeliest answer.

    Args:
        model: A model.
        tokenizer: Its tokenizer.
        exam: The questions.
        batch: Questions asked at a time.

    Returns:
        The share of exactly right answers, and all answers.
    """
    FastLanguageModel.for_inference(model)
    answers: list[str] = []
    for first in range(0, len(exam), batch):
        chats = [example.messages()[:1] for example in exam[first : first + batch]]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="np")
        outputs = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer.strip() for answer in answers]
    right = sum(answer == example.answer for answer, example in zip(answers, exam, strict=True))
    return right / len(exam), answers
