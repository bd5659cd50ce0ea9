"""The rooms behind train_lora_single.py, each with one subject.

A room imports only rooms that stand before it in this list:

    environment     what libraries read when they are imported
    console         what is printed, and a user's mistake
    files           JSON files, hashes, and renaming what an earlier run left
    code            which code decides a job's bytes, as a hash
    settings        the script's constants as flags
    stopping        signals
    checkpoints     the checkpoints and losses that a job has left
    command         the log, the lock and the exit statuses
    conversations   reading and checking the lines of a file
    device          the device, how it computes, and its memory
    delta_rule      Gated DeltaNet in a time that is linear in the length
    base            the base model
    micro_batches   the division of a step
    tokens          what the model sees, and which tokens are targets
    data            the training and the held-out examples
    losses          the loss of each target token
    fp16_matmul     scaled float16 products, for a V100
    jobs            which checkpoints belong to this job
    plan            which matrices are trained, and in how many steps
    job             all that a run knows
    record          run.json
    trainer         TRL's trainer, and its step
    events          what happens around the steps
    memory          how many examples go through the GPU at once
    saving          the adapter, verified, and what else a run leaves
"""
