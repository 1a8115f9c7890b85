"""`deepspeed_job` with the model and the batches of `across_job`, and without a scheduler: FSDP2's side has none."""

import across_job
import deepspeed_job

deepspeed_job.Tiny = across_job.Block
deepspeed_job.batch = across_job.batch
config_of = deepspeed_job.config_of
deepspeed_job.config_of = lambda task: {k: v for k, v in config_of(task).items() if k != "scheduler"}

if __name__ == "__main__":
    deepspeed_job.main()
