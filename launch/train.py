"""Train Moshi with TTT layers.

    torchrun --nproc_per_node=8 launch/train.py [CONFIG] [key.path=value …]

Without CONFIG it trains the embedded demo (`configs/demo.yaml`). Works from any folder, with or
without torchrun, on GPUs and on CPUs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

# torchrun puts this file's folder first on the path; the packages stand one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from launch.config import (
    describe_keys,
    has_ttt,
    parse_command_line,
    read_config,
    resolve_run_dir,
    utc_timestamp,
)
from launch.configuration.preflight import Start, check_start, run_warnings
from launch.errors import UserError, exit_with
from launch.feeding.batch_plan import describe_step, resolve_global_batch_size, resolve_lanes
from launch.feeding.stages import open_feeds
from launch.guards.not_finite import where_not_finite
from launch.guards.sample_guard import SampleGuard
from launch.guards.step_guard import StepGuard, describe_bad_step, too_many_bad_steps
from launch.guards.stop_signals import StopSignals
from launch.guards.watchdog import GROUPS_LATER_SEC, LEAVES_LATER_SEC, Watchdog
from launch.held_out import HeldOut
from launch.make_demo_base import DemoBaseError, ensure_demo_base
from launch.metrics import MetricsLogger, peak_flops, peak_memory_gib
from launch.optim import build_optimizers, build_schedule
from launch.reporting.plots import plot_losses
from launch.reporting.profiling import open_profiler
from launch.reporting.ttt_health import ttt_health
from launch.reporting.wandb_log import start_wandb
from launch.run_checkpoints import newest_step
from launch.run_folder import RunFolder, create_run_folder, host_facts, require_shared
from launch.run_status import RunStatus
from launch.setup import device_warnings, make_model, resume, say
from launch.step import accumulate_gradients
from parallel.checkpoint import Progress, list_checkpoints
from parallel.checkpoint_metadata import CheckpointError
from parallel.checkpoint_saver import CheckpointSaver, Keep, SaveError
from parallel.device import device_type, hide_gpus, local_device
from parallel.mesh import (
    Layout,
    build_mesh,
    close_process_group,
    from_first_rank,
    init_process_group,
    leave_job,
)
from parallel.reduce import clip_gradients, highest_over_ranks
from ttt_dist.data.manifest import DataError
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.flops import flops_per_frame
from ttt_dist.moshi.loss import LossConfig


def train(start: Start) -> None:
    """The whole run, from the process group to the last line."""
    config = start.config

    # 1. Ranks: process group, mesh, what one step consumes.
    timeout = timedelta(seconds=config.timeout_sec + GROUPS_LATER_SEC)  # the watchdog tells first
    leaves_later = LEAVES_LATER_SEC if device_type() == "cuda" else 0.0
    init_process_group(timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = local_device()
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
    axes = config.parallel
    mesh = build_mesh(Layout(axes.dp_replicate, axes.dp_shard, axes.tp), timeout)
    global_batch_size, _ = resolve_global_batch_size(config, mesh.dp_size)
    lanes = resolve_lanes(config, mesh.dp_size)
    num_lanes = config.num_lanes if lanes is None else lanes.num_lanes
    resolved = {"global_batch_size": global_batch_size, "num_lanes": num_lanes}
    config = config.model_copy(update=resolved)
    config = resolve_run_dir(config, from_first_rank(utc_timestamp()))

    # 2. Run folder: written by rank 0 once every rank has come this far.
    hosts: list[dict[str, Any]] = [{}] * world_size
    dist.all_gather_object(hosts, host_facts(rank, device))
    folder = RunFolder(Path(config.run_dir))
    if rank == 0:
        folder = create_run_folder(config, world_size=world_size, hosts=hosts)
    require_shared(folder, hosts)
    say(f"run folder: {folder.path}")
    say("mesh: " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    say(f"a step: {describe_step(config, lanes)}")
    for warning in run_warnings(config) + device_warnings(config, device):
        say(f"warning: {warning}")

    status = RunStatus(folder, rank, newest_step(folder) if config.resume else 0)
    signals = StopSignals(
        announce=lambda line: print(f"rank {rank}: {line}", flush=True),
        saves=config.do_ckpt,
        on_abort=lambda: status.failed("aborted by a second SIGINT"),
    )
    with status, signals:
        # 3. Data: audio to codes where they are not cached; pieces, or recordings, in their order.
        feeds = open_feeds(config, lanes, start.release, mesh, device)
        evaluates = "eval" in feeds.last.sets

        # 4. Model: on the meta device, laid over the ranks, filled shard by shard.
        model = make_model(config, start.release, mesh, device)
        loss_config = LossConfig.of_model(
            model,
            text_padding_weight=config.text_padding_weight,
            first_codebook_weight_multiplier=config.first_codebook_weight_multiplier,
        )

        # 5. Optimizer, schedule, and where an earlier start of this run left off.
        optimizers = build_optimizers(model, config.optim, fused=device.type == "cuda")
        schedule = build_schedule(optimizers, config.optim, config.max_steps)
        counters: dict[str, float] = {}
        feeds.start(model)
        if config.resume:
            carried = feeds.carried()
            saved = resume(folder, model, optimizers, schedule, feeds.facts, carried)
            if saved is not None:
                feeds.restore(saved.step, carried)
                counters = saved.counters
                status.resumed(saved.step)
            del carried  # the lanes' storage is another after their next step
        first_step = status.step
        feed = feeds.at(first_step)
        flops = {frames: flops_per_frame(model, frames) for frames in feeds.lengths}
        logs_health = config.ttt.log_inner_loop_losses and has_ttt(config)
        guard = StepGuard(config.bad_steps.max_in_a_row, config.bad_steps.spike_factor, counters)
        sample_guard = SampleGuard(config.data.max_bad_samples, counters)

        held_out = HeldOut(config, feeds.last, model, loss_config, mesh, device, folder)

        logger = None
        pause: Callable[[], AbstractContextManager[None]] = nullcontext
        if rank == 0:
            logger = MetricsLogger(
                folder,
                max_steps=config.max_steps,
                world_size=world_size,
                first_step=first_step,
                peak_flops=peak_flops(device),
                tensorboard=config.tensorboard,
                wandb=start_wandb(config, folder.path),
            )
            pause = logger.pause

        def newest_checkpoint() -> Path | None:
            saver.finish()
            return next(reversed(list_checkpoints(folder.checkpoints)), None)

        def run_evaluation(step: int) -> None:
            losses = held_out.measure(step, watchdog, newest_checkpoint)
            if logger is not None:
                logger.log_eval(step, losses)

        def save(step: int) -> None:
            watchdog.beat(f"the checkpoint after step {step}")
            progress = Progress(
                step=step,
                global_batch_size=global_batch_size,
                scheduler_steps=int(schedule.state_dict()["last_epoch"]),
                layout=mesh.shape,
                counters=guard.counters | sample_guard.counters,
                sources=feeds.facts,
            )
            saver.save(model, optimizers, schedule, progress, feed.carried())

        def is_due(step: int, frequency: int) -> bool:
            return step == config.max_steps or (frequency > 0 and step % frequency == 0)

        # 6. The loop.
        with (
            CheckpointSaver(
                folder.checkpoints,
                Keep(config.num_ckpt_keep, config.ckpt_keep_every),
                announce=logger.say if logger is not None else None,
                timeout=timeout,
            ) as saver,
            Watchdog(
                config.timeout_sec, rank, status.failed, status.goes_on, leaves_later
            ) as watchdog,
            feeds.batches(first_step) as batches,
            open_profiler(config.profile, folder.profile, rank, first_step) as profiler,
        ):
            # Before the first step; and after the last, where an earlier start ended without it.
            if evaluates and first_step in (0, config.max_steps):
                with pause():
                    run_evaluation(first_step)
            for step in range(first_step + 1, config.max_steps + 1):
                watchdog.beat(f"step {step}")
                feed, batch = next(batches)
                train_set = feed.sets["train"]
                left_out = sample_guard.leave_out(batch, train_set)
                if sample_guard.must_stop:
                    # Nothing of this step is done; what was, is saved, unless it is already.
                    is_new = step - 1 > first_step and not is_due(step - 1, config.ckpt_freq)
                    if config.do_ckpt and is_new:
                        save(step - 1)
                    raise UserError(
                        sample_guard.why_it_stops(step, left_out, newest_checkpoint()),
                        title="The run stopped",
                    )
                if logger is not None:
                    for line in left_out:
                        logger.say(f"warning: step {step}: a piece is left out: {line}")
                microbatches = feed.microbatches(batch)
                if logs_health and is_due(step, config.ttt.inner_loop_log_interval):
                    with pause():
                        health = ttt_health(model, microbatches, mesh)
                    if logger is not None:
                        logger.log_ttt(step, health)
                loss = accumulate_gradients(
                    model,
                    microbatches,
                    loss_config,
                    mesh,
                    reduce_every_microbatch=config.parallel.reduce_every_microbatch,
                )
                grad_norm = clip_gradients(model.parameters(), config.max_norm).item()
                problem = guard.problem(loss.total.item(), grad_norm)
                # What one rank has met, all ranks act upon: before the weights are touched.
                bad, unsaved, stop = highest_over_ranks(
                    [problem is not None, saver.has_failed(), signals.number]
                )
                if unsaved:
                    saver.finish()  # raises what went wrong
                lr = max(group["lr"] for group in optimizers.optimizers[0].param_groups)
                if bad:
                    guard.skip()
                    place = where_not_finite(model, microbatches, loss.microbatches, grad_norm)
                    feed.forget_broken()
                    bad_step = describe_bad_step(
                        step, problem, place, loss, batch.samples, train_set
                    )
                    if logger is not None:
                        logger.log_bad_step(bad_step)
                else:
                    guard.accept(grad_norm)
                    optimizers.step()
                del microbatches  # and what their lanes started from
                schedule.step()
                optimizers.zero_grad()
                status.done(step)
                profiler.step()
                if logger is not None:
                    frames = train_set.frames
                    logger.after_step(global_batch_size * frames, flops_per_frame=flops[frames])
                    if is_due(step, config.log_freq) and not bad:
                        logger.log_step(
                            step,
                            loss=loss.total.item(),
                            text_loss=loss.text.item(),
                            audio_loss=loss.audio.item(),
                            grad_norm=grad_norm,
                            lr=lr,
                            peak_memory_gib=peak_memory_gib(device),
                            extra={
                                "skipped_steps": guard.skipped,
                                "skipped_samples": sample_guard.skipped,
                            },
                        )
                preempted = bool(stop) and step < config.max_steps
                ends = preempted or guard.must_stop
                with pause():
                    # In this order: what an evaluation meets costs no checkpoint.
                    if config.do_ckpt and (is_due(step, config.ckpt_freq) or ends):
                        save(step)
                    if evaluates and is_due(step, config.eval_freq) and not ends:
                        run_evaluation(step)
                if guard.must_stop:
                    saver.finish()
                    told = too_many_bad_steps(guard, bad_step, saved=config.do_ckpt)
                    raise UserError(told, title="The run stopped")
                if preempted:
                    status.preempted_by = signals.describe(stop)
                    break
            watchdog.beat("the last checkpoint")
            saver.finish()

        # 7. The end: what the run left, and what to do next.
        curve = None
        if logger is not None:
            logger.close()
            curve = plot_losses(folder.metrics, folder.loss_curve)
    say(f"\nrun folder: {folder.path}" + (f"\nloss curve: {curve}" if curve else ""))
    if status.preempted_by:
        go_on = "; to go on: resume=true" if config.do_ckpt else ""
        say(f"ended by {status.preempted_by} after step {status.step}{go_on}")
    say(f"next: tensorboard --logdir {folder.path.parent}")
    close_process_group()


def main(arguments: list[str]) -> None:
    """Check everything a person may have mistaken, then train."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys:\n{describe_keys()}")
        return
    # The losses are views of FSDP2's outputs and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        named = read_config(*parse_command_line(arguments)).config.moshi_paths.hf_repo_id
        ensure_demo_base(named, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
        start = check_start(
            arguments,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            rank=int(os.environ.get("RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        if start.config.device == "cpu":
            hide_gpus()
        train(start)
    except UserError as error:
        exit_with(error)
    except SaveError as error:
        exit_with(UserError(str(error), title="The run stopped"))
    except DataError as error:
        exit_with(UserError(error.problems))
    except (ReleaseError, CheckpointError, DemoBaseError) as error:
        exit_with(UserError(str(error)))


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_job(0)
