"""What other trainers call a field, for the hint in an error message."""

# Their name -> our field, or our FIELD=VALUE where their flag is one value of ours. Written the
# other way round below, as several of their names mean one of ours.
HERE = {
    there: here
    for here, names in {
        "steps": (
            "max_iters max_steps num_steps train_steps iters iterations epochs num_train_epochs"
        ),
        "batch_size": (
            "gradient_accumulation_steps grad_accum_steps grad_acc_steps train_batch_size gbs "
            "global_batch_size"
        ),
        "micro_batch_size": (
            "mbs local_batch_size device_batch_size "
            "per_device_train_batch_size train_micro_batch_size_per_gpu"
        ),
        "block_size": "seq_len seq_length max_seq_len max_length context_length n_ctx n_positions",
        "n_layer": "layers num_layers n_layers num_hidden_layers depth",
        "n_head": "heads num_heads n_heads num_attention_heads",
        "n_kv_head": "num_key_value_heads num_kv_heads",
        "n_embd": "n_embed dim d_model hidden_size width",
        "arch": "model model_type",
        "optim": "optimizer",
        "lr": "learning_rate max_lr",
        "min_lr_frac": "min_lr min_lr_ratio",
        "weight_decay": "wd decay",
        "opt.betas": "beta1 beta2 betas adam_beta1 adam_beta2",
        "opt.eps": "eps",
        "opt.momentum": "momentum",
        "grad_clip": "clip clip_grad max_grad_norm gradient_clipping",
        "warmup_steps": "warmup_iters warmup",
        "warmup_frac": "warmup_ratio",
        "schedule": "decay_lr scheduler lr_scheduler lr_scheduler_type",
        "precision": "dtype amp mixed_precision",
        "precision=bf16": "bf16",
        "precision=fp16": "fp16 half",
        "precision=fp8": "fp8",
        "data": "dataset data_path",
        "out_dir": "out output_dir save_dir log_dir",
        "eval_every": "eval_interval eval_steps",
        "eval_tokens": "eval_iters",
        "log_every": "log_interval",
        "save_every": "save_interval save_steps save_frequency",
        "keep": "save_total_limit",
        "resume": "resume_from resume_from_checkpoint load_checkpoint",
        "init_from": "pretrained finetune",
        "wandb": "wandb_log wandb_project",
        "data_parallel=ddp": "ddp data_parallel_replicate_degree",
        "data_parallel=fsdp": "fsdp data_parallel_shard_degree fully_shard",
        "data_parallel=zero1": "zero zero1 zero_stage stage",
        "data_parallel=zero2": "zero2",
        "data_parallel=zero3": "zero3",
        "tp": "tp_size tensor_parallel tensor_parallel_degree tensor_model_parallel_size",
        "sp": "sequence_parallel",
        "pp": "pp_size pipeline_parallel pipeline_parallel_degree pipeline_model_parallel_size",
        "pp_schedule": "pp_engine",
        "cp": "cp_size context_parallel context_parallel_degree",
        "offload=cpu": "offload_optimizer cpu_offload",
        "offload_params=cpu": "offload_param",
        "activation_checkpoint=full": (
            "gradient_checkpointing activation_checkpointing ac recompute"
        ),
        "tied": "tie_word_embeddings weight_tying tie_weights",
        "compile=default": "torch_compile",
    }.items()
    for there in names.split()
}
