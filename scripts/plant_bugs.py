"""Plant bugs in a copy of the package, one at a time, and see the tests catch them.

    python scripts/plant_bugs.py [--only NAME] [--jobs 2]

A bug is a piece of source text and what replaces it. For each one the package is copied to a
temporary folder and changed there, and a few tests run against the copy. The tests of all bugs run
once against an unchanged copy before that, where they must pass. The exit code is 1 if a bug is not
caught, cannot be planted, or the tests fail without one.
"""

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import datasets  # noqa: F401 (imported once here, for all forks)
import peft  # noqa: F401
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "polyroute"
FAILED = re.compile(r"^FAILED tests/(\S+?\.py)::(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Bug:
    """One change of one file, and the tests that must notice it."""

    name: str
    file: str
    before: str
    """Text that the file holds exactly once."""
    after: str
    tests: tuple[str, ...]
    """Files of `tests/`, or single tests as `file::name`."""


INVENTORY, MIXER = "routes/inventory.py", "routes/mixer.py"
MIX = "        return mix_skills(skills, w_UnHK * scale if scale != 1.0 else w_UnHK, sets)\n"
RULES, WEIGHTS = "routes/table_rules.py", "routes/weights.py"
FACTORS, KERNELS = "layer/factors.py", "layer/kernels.py"

BUGS = (
    # ------------------------------------------------------------- the equations
    Bug(
        "the average is scaled twice", INVENTORY,
        "nn.Parameter(self._as_one(stack, factor).clone())",
        "nn.Parameter(\n"
        "                self._as_one(stack, factor)\n"
        "                * (self.scale if factor == 'lora_b' else 1.0)\n"
        "            )",
        ("test_inventory.py::test_the_collapsed_average_computes_what_mu_computes",),
    ),
    Bug(
        "the average forgets its scale", "routes/phases.py",
        "alpha=scale * rank,", "alpha=float(rank),",
        ("test_checkpoint_files.py::test_an_averaged_model_can_be_saved",),
    ),
    Bug(
        "the heads of B are interleaved", INVENTORY, MIX,
        MIX.replace("return", "mixed =")
        + "        if factor == 'lora_b':\n"
        "            return mixed.unflatten(-1, (self.heads, -1)).mT.flatten(-2)\n"
        "        return mixed\n",
        ("test_inventory.py::test_mu_is_the_plain_mean_of_the_skills",),
    ),
    Bug(
        "alpha/rank is forgotten", INVENTORY,
        'scale = self.scale if factor == "lora_b" else 1.0', "scale = 1.0",
        ("test_inventory.py::test_mu_is_the_plain_mean_of_the_skills",),
    ),
    Bug(
        "A is scaled as well as B", INVENTORY,
        'scale = self.scale if factor == "lora_b" else 1.0', "scale = self.scale",
        ("test_inventory.py::test_mu_is_the_plain_mean_of_the_skills",),
    ),
    Bug(
        "the skills of B are reversed", INVENTORY, MIX,
        MIX.replace("skills,", "skills if factor == 'lora_a' else skills.flip(2),", 1),
        ("test_inventory.py::test_factors_are_the_blocks_mixed_head_by_head",),
    ),
    Bug(
        "B is not zero at the start", INVENTORY,
        'skills.fill_(1.0 if factor == "ia3" else 0.0)',
        'skills.fill_(1.0 if factor == "ia3" else 1e-3)',
        ("test_inventory.py::test_a_is_uniform_within_its_published_bound_and_b_is_zero",),
    ),
    Bug(
        "softmax replaces the normalised sigmoid", WEIGHTS,
        "torch.softmax(torch.nn.functional.logsigmoid(logits), dim=-1)",
        "torch.softmax(logits, dim=-1)",
        ("test_routing.py::test_weights_are_the_normalised_sigmoids",),
    ),
    Bug(
        "an epsilon is in the denominator", WEIGHTS,
        "        return torch.softmax(torch.nn.functional.logsigmoid(logits), dim=-1)\n",
        "        gates = torch.sigmoid(logits)\n"
        "        return gates / (gates.sum(-1, keepdim=True) + EPSILON)\n",
        ("test_routing.py::test_weights_are_the_normalised_sigmoids",),
    ),
    Bug(
        "gates are noisy in evaluation", WEIGHTS,
        'if config.gate == "relaxed_bernoulli" and training:',
        'if config.gate == "relaxed_bernoulli":',
        ("test_routing.py::test_evaluation_is_deterministic",),
    ),
    Bug(
        "annealing runs backwards", WEIGHTS,
        "a = math.cos(math.pi / 2 * progress)", "a = math.sin(math.pi / 2 * progress)",
        ("test_routing.py::test_annealing_follows_the_cosine_to_the_uniform_mixture",),
    ),
    Bug(
        "weights of the output space apply to A too", INVENTORY,
        'w_UnHK = w_UnHK * scale if factor == "lora_b" else torch.ones_like(w_UnHK)',
        'w_UnHK = w_UnHK * scale if factor == "lora_b" else w_UnHK',
        ("test_output_space.py::test_a_task_adds_the_weighted_sum_of_what_its_skills_add",),
    ),
    Bug(
        "the input's gradient forgets the update", KERNELS,
        "dx = (dy @ weight).addmm_(dz, a) if need_x else None",
        "dx = dy @ weight if need_x else None",
        ("test_kernels.py::test_the_plain_path_equals_the_one_that_owns_the_arithmetic",),
    ),
    # ------------------------------------------------------------- who gets which task
    Bug(
        "rows get each other's task", MIXER,
        "position = {row: i for i, row in enumerate(distinct)}",
        "position = {row: i for i, row in enumerate(reversed(distinct))}",
        ("test_model.py::test_a_mixed_batch_equals_its_rows_one_by_one",),
    ),
    Bug(
        "the gather of examples is lost", INVENTORY,
        "elif gather is not None:", "elif gather is not None and len(gather) % mixed.shape[1]:",
        ("test_model.py::test_tasks_that_repeat_evenly_keep_their_places",),
    ),
    Bug(
        "one id broadcasts over the batch", "routes/tasks.py",
        "return Route(rows, per_example=True)", "return Route(rows, per_example=len(rows) > 1)",
        ("test_model.py::test_a_batch_that_the_tasks_do_not_fit_is_refused",),
    ),
    Bug(
        "tasks outlive their block", "layer/open_route.py",
        "entry.is_open = False  #", "entry.is_open = True  #",
        ("test_model.py::test_routes_nest_and_close_after_an_error",),
    ),
    Bug(
        "the mask of the rows of mu is dropped", RULES,
        "        if MU_ROW in rows:\n            is_mu", "        if False:\n            is_mu",
        ("test_model.py::test_mu_can_stand_beside_tasks_in_a_batch",),
    ),
    Bug(
        "private tasks take the next task's skill", RULES,
        "return Choice(None, index_on(device, tuple(rows)))",
        "return Choice(None, index_on(device, tuple((row + 1) % num_skills for row in rows)))",
        ("test_inventory.py::test_a_private_task_uses_exactly_its_own_skill",),
    ),
    Bug(
        "packed examples begin one token late", "layer/segments.py",
        "        return list(zip([0, *ends[:-1]], ends, strict=True))\n",
        "        cuts = [min(end + 1, ends[-1]) for end in ends[:-1]]\n"
        "        return list(zip([0, *cuts], [*cuts, ends[-1]], strict=True))\n",
        ("test_packed_rows.py::test_outputs_and_gradients_are_those_of_the_unpacked_batch",),
    ),
    Bug(
        "gates of examples are spread out of order", "layer/gated.py",
        "return weights.unsqueeze(1).expand(-1, times, -1, -1).reshape(count, *shape)",
        "return weights.unsqueeze(0).expand(times, -1, -1, -1).reshape(count, *shape)",
        ("test_output_space.py::test_every_spread_of_weights_follows_the_equation",),
    ),
    Bug(
        "a slot takes another slot's skills", RULES,
        "else index_on(device, tuple(rows))\n",
        "else index_on(device, tuple((r + 1) % inventory.num_sets for r in rows))\n",
        ("test_adapt.py::test_every_slot_ends_where_it_would_end_alone",),
    ),
    Bug(
        "examples of one task share their noise", MIXER,
        "distinct = list(rows) if per_example else list(dict.fromkeys(rows))",
        "distinct = list(dict.fromkeys(rows))",
        ("test_model.py::test_noise_is_drawn_for_every_example_in_training_only",),
    ),
    Bug(
        "a recomputed block takes the route that is open now", "layer/routed_layer.py",
        "and not self.open_routes.is_recomputing", "and False",
        ("test_gradient_checkpointing.py::test_a_part_that_is_recomputed_never_takes_what_another_part_was_given",),
    ),
    # ------------------------------------------------------------- what is kept
    Bug(
        "kept mixtures outlive a change", MIXER,
        "if cached is not None and cached[0] == stamp:", "if cached is not None:",
        ("test_model.py::test_factors_are_mixed_again_after_any_change",),
    ),
    Bug(
        "a mixture outlives its forward", "forward.py",
        "        # The mixture ends with its forward: a part that is called next mixes again.\n"
        "        if not torch.compiler.is_compiling():",
        "        if False:",
        ("test_model.py::test_a_part_called_after_the_model_has_its_own_route",),
    ),
    Bug(
        "dropout acts in evaluation", "layer/routed_layer.py",
        "dropout = self.dropout if self.training else 0.0", "dropout = self.dropout",
        ("test_kernels.py::test_adapter_dropout_acts_in_training_only_and_on_the_update_only",),
    ),
    # ------------------------------------------------------------- training
    Bug(
        "the base model is not frozen", "layer/wrapping.py",
        "        self.base_model.requires_grad_(False)\n", "",
        ("test_model.py::test_base_parameters_are_frozen_and_unchanged_after_a_step",),
    ),
    Bug(
        "the router gets no gradient", RULES,
        "logits = mixer.table.gather(rows).view(len(rows), *mixer.shape)",
        "logits = mixer.table.gather(rows).view(len(rows), *mixer.shape).detach()",
        ("test_phases.py::test_full_trains_all_skills_and_the_table",),
    ),
    Bug(
        "phase z trains the skills", "routes/phases.py",
        'mixer.inventory.requires_grad_(phase != "z")', "mixer.inventory.requires_grad_(True)",
        ("test_phases.py::test_z_trains_the_new_rows_only",),
    ),
    Bug(
        "all rows share one clock", "routes/row_optimizer.py",
        "steps = list(self._clocks[places].unbind())",
        "steps = [self._clocks.max().clone() for _ in rows]",
        ("test_row_optimizer.py::test_each_row_moves_as_under_adamw_run_on_its_own_steps",),
    ),
    Bug(
        "phase mu steps by the size of the average", "optimizers.py",
        "        if \"spread\" in state:\n            size", "        if False:\n            size",
        ("test_mu_steps.py::test_the_average_moves_as_the_copies_do",),
    ),
    Bug(
        "Adafactor measures whole stacks", "optimizers.py",
        "    within = tuple(range(1, tensors.ndim))\n"
        "    norms: Tensor = torch.linalg.vector_norm(tensors, dim=within, keepdim=True)\n"
        "    return norms / math.sqrt(tensors[0].numel())\n",
        "    norms: Tensor = torch.linalg.vector_norm(tensors).view([1] * tensors.ndim)\n"
        "    return norms / math.sqrt(tensors.numel())\n",
        ("test_optimizers.py::test_every_layer_and_router_moves_as_a_tensor_of_its_own",),
    ),
    # ------------------------------------------------------------- merging, saving, exporting
    Bug(
        "merging is off by a thousandth", FACTORS,
        "return weight + (self.b.t() @ self.a)", "return weight + 1.001 * (self.b.t() @ self.a)",
        ("test_merging.py::test_a_merged_model_computes_the_task_and_unmerging_restores_every_bit",),
    ),
    Bug(
        "a merged bias is not scaled", FACTORS,
        "None if bias is None else bias * scale", "bias",
        ("test_merging.py::test_every_method_merges",),
    ),
    Bug(
        "an exported task lacks its scale", "model.py",
        "        target.write(folder, list(adapted.values()))\n",
        "        for factors in adapted.values():\n"
        "            vars(factors)['b'] = factors.b / self.adapter_config.scale\n"
        "        target.write(folder, list(adapted.values()))\n",
        ("test_peft_export.py::test_peft_computes_the_exported_task",),
    ),
    Bug(
        "tasks of an export are swapped", "exchange/peft_folders.py",
        "for place in places.tolist()]", "for place in reversed(places.tolist())]",
        ("test_export_all.py::test_every_folder_is_that_of_the_single_task",),
    ),
    Bug(
        "a killed export passes for whole", "exchange/peft_folders.py",
        "is_file() and (folder / TENSORS).is_file()", "is_file()",
        ("test_export_all.py::test_a_killed_export_goes_on_with_what_is_left",),
    ),
    Bug(
        "another base model passes for the own one", "layer/fingerprint.py",
        '    if not fits_sample(tensor, one["values"], one["dtype"]):\n        return False\n',
        "    if tensor.numel():\n        return True\n",
        ("test_checkpoint_files.py::test_a_lightly_tuned_base_is_refused_in_the_same_type_only",),
    ),
    Bug(
        "a checkpoint of another scale is loaded", "config.py",
        "None, number(above=0, optional=True), computes=True,",
        "None, number(above=0, optional=True),",
        ("test_checkpoint_files.py::test_a_checkpoint_of_another_scale_is_not_loaded_into_a_model",),
    ),
    Bug(
        "the parameters of a rule are not saved", "saved/inventory.py",
        '        **{f"rule.{name}": tensor for name, tensor in mixer.rule.state_dict().items()},\n',
        "",
        ("test_rules.py::test_saved_and_loaded_it_is_the_same_bit_for_bit",),
    ),
    Bug(
        "whole modules are not restored", "saved/inventory.py",
        '        **{f"module.{name}": tensor for name, tensor in'
        " tensors_of(wrapping.trained).items()},\n",
        "",
        ("test_modules_to_save.py::test_saved_and_loaded_the_module_is_the_same_bit_for_bit",),
    ),
    Bug(
        "unloading keeps what whole modules learned", "layer/wrapping.py",
        "        if not keep_trained:\n", "        if False:\n",
        ("test_modules_to_save.py::test_unloading_puts_the_module_back_and_merging_keeps_it",),
    ),
    Bug(
        "new tokens get an update of ones", INVENTORY,
        'neutral = 1.0 if self.adapter == "ia3" else 0.0', "neutral = 1.0",
        ("test_inputs.py::test_the_vocabulary_is_resized_under_an_adapted_head",),
    ),
    # ------------------------------------------------------------- the data
    Bug(
        "the task with the shortest examples sets the limits", "study/lengths.py",
        "Lengths(max(prompts), max(targets)", "Lengths(min(prompts), min(targets)",
        ("test_lengths.py::test_lengths_are_the_largest_of_the_tasks_95_percent",),
    ),
    Bug(
        "targets get the code of the source language", "kinds/seq2seq.py",
        "for ids in target_token_ids(self.tokenizer, texts)]",
        "for ids in self._tokens(texts, special=True)]",
        ("test_target_languages.py",),
    ),
    Bug(
        "a file called dev is a training task", "data/suite.py",
        '"val", "dev", "eval"', '"val", "eval"',
        ("test_untidy_files.py::test_dev_and_its_like_are_the_validation_split",),
    ),
    Bug(
        "empty answers are not counted", "data/suite.py",
        "    if not counts:\n        return\n", "    if counts:\n        return\n",
        ("test_untidy_files.py::test_empty_answers_are_counted_in_one_warning_from_the_cache_too",),
    ),
    Bug(
        "a key that an object has twice keeps its last value", "host/json_text.py",
        "object_pairs_hook=_unique,", "object_pairs_hook=dict,",
        ("test_untidy_files.py::test_what_is_nearly_right_is_refused_by_what_is_wrong",),
    ),
    Bug(
        "a turn of weight 0 is learned", "data/readers/conversations.py",
        "return weight != 0", "return True",
        ("test_shapes.py::test_a_turn_of_weight_0_is_only_context",),
    ),
    Bug(
        "an answer gets no end token from us", "kinds/chat.py",
        "rest if rest < len(behind) else None", "rest",
        ("test_chat.py::test_an_answer_is_not_cut_where_no_token_ends_a_turn",),
    ),
    Bug(
        "a stratified draw is a plain one", "adapting/shots.py",
        "if settings.stratify and classes is not None:", "if False:",
        ("test_shots.py::test_a_stratified_draw_has_as_many_of_each_answer_also_for_validation",),
    ),
    Bug(
        "the validation loss is that of the last batch", "trainer.py",
        "float(_mean_loss(self._evaluated))", "float(_mean_loss(self._evaluated[-1:]))",
        ("test_validation.py::test_the_loss_is_that_of_all_rows_as_one_batch",),
    ),
    Bug(
        "the digest of a running slot is not compared", "adapting/slot.py",
        "if SHA256 in note and note.pop(SHA256) != digest_of(tensors, note):",
        "if note.pop(SHA256, None) == 0:",
        ("test_damage.py::test_a_damaged_slot_is_named_and_starts_anew",),
    ),
    Bug(
        "a checkpoint is written into what stands there", "training/routed_trainer.py",
        "            remove(place)\n", "            pass\n",
        ("test_hostile.py::test_a_checkpoint_is_not_written_through_a_link",),
    ),
    Bug(
        "the end of a slot is not looked at", "adapting/loop.py",
        "        self._look_at_ends(over)\n", "",
        ("test_adapt.py::test_a_slot_that_diverges_in_its_last_step_has_diverged",),
    ),
    Bug(
        "a packed forward loses an example", "adapting/row_batches.py",
        "left = left[count:]", "left = left[count + 1 :]",
        ("test_packing.py::test_packed_forwards_of_slots_stay_within_the_tokens_and_lose_no_example",),
    ),
    Bug(
        "examples share what only the first two begin with", "kinds/packing.py",
        "zip(whole[own[0]], whole[own[-1]], strict=False)",
        "zip(whole[own[0]], whole[own[:2][-1]], strict=False)",
        ("test_shared_beginnings.py",),
    ),
    Bug(
        "examples with dropout share its draws", "kinds/causal.py",
        "(in_training_mode and draws_numbers(model, task))", "False",
        ("test_shared_beginnings.py::test_what_is_random_is_not_shared",),
    ),
    # ------------------------------------------------------------- serving
    Bug(
        "a token is routed as the next request's task", "serving/continuous.py",
        "tasks = [None if running is None else running.held.route for running, _ in requests]",
        "tasks = [None if running is None else running.held.route for running, _ in requests]\n"
        "        tasks = [*tasks[1:], tasks[0]]",
        ("test_serving.py::test_each_request_meets_its_own_keys_alone_on_a_cpu",),
    ),
    Bug(
        "requests attend to the keys of the next one", "serving/packed_attention.py",
        "torch.where(is_own, first[:, None] + steps, first[:, None]), is_own",
        "(first[:, None] + steps).clamp(max=int(first[-1])), is_own | True",
        ("test_serving.py::test_each_request_meets_its_own_keys_alone_on_a_cpu",),
    ),
    Bug(
        "a row that changed is served from memory", "serving/service.py",
        "        is_new = self._saved.put(name, row)\n        self.engine.places.forget(name)\n",
        "        is_new = self._saved.put(name, row)\n",
        ("test_serving.py::test_rows_come_and_go_while_it_runs",),
    ),
    Bug(
        "a place that a request holds is given away", "serving/places.py",
        "            if not self._holders[place]:\n                del self._places[name]\n",
        "            if True:\n                del self._places[name]\n",
        ("test_serving.py::test_a_place_that_a_request_holds_is_given_to_no_other",),
    ),
    Bug(
        "a key reaches the tasks of another", "serving/http/access.py",
        "return name if name in SHARED else self.prefix + name",
        "return name",
        ("test_serving_http.py::test_what_a_key_makes_and_removes_is_its_own",),
    ),
    Bug(
        "any key will do", "serving/http/access.py",
        "if hmac.compare_digest(given, known):", "if given:",
        ("test_serving_http.py::test_nothing_is_told_without_a_key",),
    ),
    Bug(
        "the queue has no bound", "serving/text_engine.py",
        "if len(self.requests) >= self.limits.most_requests:", "if False:",
        ("test_serving.py::test_too_many_requests_are_told_to_wait",),
    ),
)  # fmt: skip


def copied(folder: Path) -> Path:
    """Copy the package to a folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, folder / "polyroute", ignore=ignored))


def plant(bug: Bug, copy: Path) -> None:
    """Make a bug's change in a copy of the package.

    Raises:
        SystemExit: the copy does not hold the text exactly once.
    """
    path = copy / bug.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(bug.before)) != 1:
        sys.exit(f"{bug.name!r}: {bug.file} holds this {count} times, not once:\n{bug.before}")
    changed = text.replace(bug.before, bug.after)
    ast.parse(changed, bug.file)
    path.write_text(changed, encoding="utf-8")


def run_tests(folder: Path, tests: Sequence[str]) -> None:
    """In a process of its own: run tests against the copy in a folder, up to the first failure."""
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short"]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    where = str(sys.modules["polyroute"].__file__)
    if not where.startswith(str(folder)):
        print(f"the tests saw {where} rather than the copy")
        code = pytest.ExitCode.INTERNAL_ERROR
    sys.exit(code)


class Trial:
    """Tests that run in a process of their own, against a copy with a bug or without one.

    Raises:
        SystemExit: the bug cannot be planted.
    """

    def __init__(self, bug: Bug | None, tests: Sequence[str]) -> None:
        self.bug = bug
        self.began = time.monotonic()
        self.folder = Path(tempfile.mkdtemp())
        copy = copied(self.folder)
        if bug is not None:
            plant(bug, copy)
        # A fork has imported torch and transformers already, which takes longer than the tests.
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=run_tests, args=(self.folder, tests))
        self.process.start()

    def failed_test(self) -> str | None:
        """The first test that fails, if one does; waits for the end.

        Raises:
            SystemExit: the tests cannot run.
        """
        self.process.join()
        output = (self.folder / "output").read_text()
        shutil.rmtree(self.folder)
        failed = FAILED.search(output)
        if self.process.exitcode and failed is None:
            what = "without a bug" if self.bug is None else repr(self.bug.name)
            sys.exit(f"{what}: the tests end with {self.process.exitcode}:\n{output[-3000:]}")
        return "::".join(failed.groups()) if failed else None

    def report(self) -> bool:
        """Print a line, and tell whether a test caught the bug."""
        assert self.bug is not None
        test = self.failed_test()
        seconds = time.monotonic() - self.began
        print(f"{self.bug.name:52} {test or 'NOT CAUGHT':92} {seconds:5.1f} s", flush=True)
        return test is not None


def count_caught(bugs: Sequence[Bug], jobs: int) -> int:
    """Plant bugs, some of them side by side, and count those that a test catches."""
    caught, waiting, running = 0, list(bugs), list[Trial]()
    while waiting or running:
        while waiting and len(running) < jobs:
            bug = waiting.pop(0)
            running.append(Trial(bug, bug.tests))
        connection.wait([trial.process.sentinel for trial in running])
        for trial in [trial for trial in running if not trial.process.is_alive()]:
            running.remove(trial)
            caught += trial.report()
    return caught


def main() -> int:
    """Plant the bugs and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[bug.name for bug in BUGS], help="plant this bug alone")
    parser.add_argument("--jobs", type=int, default=2, help="bugs to plant side by side")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process that runs threads may wait for ever
    for name in ("Trainer", "T5ForConditionalGeneration", "LlamaForCausalLM", "GPT2LMHeadModel"):
        getattr(transformers, name)  # transformers imports a model when it is asked for
    bugs = [bug for bug in BUGS if given.only in (None, bug.name)]
    tests = sorted({test for bug in bugs for test in bug.tests})
    if (failed := Trial(None, tests).failed_test()) is not None:
        sys.exit(f"{failed} fails without a bug")
    caught = count_caught(bugs, given.jobs)
    print(f"{caught} of {len(bugs)} bugs were caught")
    return 0 if caught == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
