"""What other trainers call a field or a recipe, for the hint in an error message."""

# Their name -> our field, or our FIELD=VALUE where their flag is one value of ours. Written the
# other way round below, as several of their names mean one of ours.
HERE = {
    there: here
    for here, names in {
        "steps": (
            "max_iters max_steps num_steps total_steps train_steps train_iters iters iterations "
            "epochs num_train_epochs lr_decay_iters lr_decay_steps"
        ),
        "batch_size": ("train_batch_size gbs global_batch_size"),
        "micro_batch_size": (
            "mbs local_batch_size device_batch_size "
            "per_device_train_batch_size train_micro_batch_size_per_gpu"
        ),
        "block_size": (
            "seq_len seq_length max_seq_len max_length context_length n_ctx n_positions "
            "max_position_embeddings sequence_length"
        ),
        "n_layer": "layers num_layers n_layers num_hidden_layers depth",
        "n_head": "heads num_heads n_heads num_attention_heads",
        "n_kv_head": "num_key_value_heads num_kv_heads num_query_groups n_kv_heads",
        "n_embd": "n_embed dim d_model hidden_size width",
        "arch": "model model_type",
        "head_dim": "head_size d_head kv_channels attention_head_size",
        "mlp_width": ("intermediate_size ffn_hidden_size hidden_dim ffn_dim d_ff n_inner mlp_dim"),
        "activation": "hidden_act activation_function act_fn hidden_activation",
        "activation=swiglu": "swiglu use_swiglu",
        "rope_base": "rope_theta rotary_base rotary_emb_base",
        "norm_eps": "rms_norm_eps layer_norm_epsilon layer_norm_eps layernorm_epsilon norm_epsilon",
        "qkv_bias": "attention_bias add_qkv_bias",
        "n_expert": (
            "num_experts n_experts num_local_experts n_routed_experts num_routed_experts "
            "moe_num_experts moe use_moe"
        ),
        "n_expert_active": (
            "num_experts_per_tok num_experts_per_token experts_per_token top_k moe_top_k "
            "moe_router_topk router_topk"
        ),
        "n_shared_expert": "n_shared_experts num_shared_experts moe_num_shared_experts",
        "expert_width": "moe_intermediate_size moe_ffn_hidden_size moe_hidden_dim moe_inter_dim",
        "moe_every": "moe_layer_freq decoder_sparse_step interleave_moe_layer_step",
        "router": "scoring_func score_func moe_router_score_function",
        "normalize_gates": "norm_topk_prob route_norm",
        "router_z_loss": (
            "router_z_loss_coef router_z_loss_weight moe_z_loss_coeff moe_zloss_weight"
        ),
        "moe_bias_lr": (
            "load_balance_coeff bias_update_speed moe_router_bias_update_rate "
            "moe_router_enable_expert_bias"
        ),
        "moe_sequence_loss": "aux_loss_alpha seq_aux",
        "ep": (
            "ep_size expert_parallel expert_parallel_degree expert_parallel_size "
            "expert_model_parallel_size"
        ),
        "qk_norm": "qk_layernorm use_qk_norm",
        "profile": "profiler profiling enable_profiling profile_steps profile_freq",
        "optim": "optimizer optimizer.type optimizer_name",
        "lr": "learning_rate max_lr",
        "min_lr_frac": "min_lr min_lr_ratio",
        "weight_decay": "wd decay",
        "opt.betas": "beta1 beta2 betas adam_beta1 adam_beta2",
        "opt.eps": "eps adam_eps adam_epsilon",
        "opt.fused": "fused fused_adam use_fused_adam adamw_fused",
        "opt.momentum": "momentum",
        "grad_clip": "clip clip_grad max_grad_norm gradient_clipping",
        "warmup_steps": "warmup_iters warmup lr_warmup_steps lr_warmup_iters warmup_num_steps",
        "warmup_frac": "warmup_ratio lr_warmup_fraction",
        "decay_frac": "decay_ratio warmdown_ratio cooldown_frac",
        "schedule": (
            "decay_lr scheduler scheduler.type lr_scheduler lr_scheduler_type lr_decay_style "
            "decay_type"
        ),
        "precision": "dtype amp mixed_precision autocast torch_dtype",
        "precision=bf16": "bf16 bf16.enabled bfloat16",
        "precision=fp16": "fp16 fp16.enabled half float16",
        "precision=fp8": "fp8 float8 enable_float8_linear",
        "data": "dataset data_path",
        "data_field": "dataset_text_field text_column text_column_name json_keys",
        "out_dir": "out output_dir save_dir log_dir dump_folder checkpoint_dir",
        "eval_every": "eval_interval eval_steps",
        "eval_tokens": "eval_iters",
        "log_every": "log_interval log_freq logging_steps",
        "save_every": (
            "save_interval save_steps save_frequency checkpoint_interval checkpoint.interval "
            "always_save_checkpoint"
        ),
        "async_save": "async_mode",
        "keep": "save_total_limit keep_latest_k",
        "resume": "resume_from resume_from_checkpoint load_checkpoint",
        "init_from": "pretrained finetune model_name_or_path pretrained_model_name_or_path",
        "wandb": "wandb_log wandb_project use_wandb enable_wandb report_to",
        "tensorboard": "enable_tensorboard",
        "data_parallel=ddp": "ddp use_ddp data_parallel_replicate_degree",
        "data_parallel=fsdp": (
            "fsdp use_fsdp fsdp2 data_parallel_shard_degree fully_shard sharding_strategy"
        ),
        "data_parallel=zero1": "zero zero1 zero_stage stage use_distributed_optimizer",
        "data_parallel=zero2": "zero2",
        "data_parallel=zero3": "zero3",
        "tp": "tp_size tensor_parallel tensor_parallel_degree tensor_model_parallel_size",
        "sp": "sequence_parallel",
        "pp": "pp_size pipeline_parallel pipeline_parallel_degree pipeline_model_parallel_size",
        "pp_schedule": "pp_engine pipeline_parallel_schedule",
        "cp": "cp_size context_parallel context_parallel_degree context_parallel_size",
        "reshard": "reshard_after_forward",
        "reduce_dtype": "communication_data_type mixed_precision_reduce",
        "param_dtype": "mixed_precision_param",
        "bucket_mb": "bucket_cap_mb reduce_bucket_size allgather_bucket_size",
        "offload=cpu": "offload_optimizer offload_optimizer.device cpu_offload",
        "offload_params=cpu": "offload_param offload_param.device",
        "activation_checkpoint=full": (
            "gradient_checkpointing activation_checkpointing ac recompute recompute_activations "
            "activation_checkpoint.mode"
        ),
        "tied": "tie_word_embeddings weight_tying tie_weights",
        "compile=default": "torch_compile",
        "activation_checkpoint=full_sharded": (
            "partition_activations activation_checkpointing.partition_activations"
        ),
        "activation_checkpoint=full_offload": "cpu_checkpointing",
        "scaler.fixed": "loss_scale",
        "scaler.init_power": "initial_scale_power",
        "scaler.window": "loss_scale_window",
        "scaler.hysteresis": "hysteresis",
        "scaler.min_scale": "min_loss_scale",
    }.items()
    for there in names.split()
}

# What needs no flag here -> why.
ABSENT = {
    there: why
    for why, names in {
        "it follows: the ranks / (tp x cp x pp)": "dp dp_size data_parallel_size num_replicas",
        "it follows: --batch_size counts the sequences of a step over all ranks, "
        "--micro_batch_size those of one forward (nanoGPT's batch_size x "
        "gradient_accumulation_steps is our batch_size)": (
            "gradient_accumulation_steps gradient_accumulation grad_accum_steps grad_accum "
            "grad_acc_steps"
        ),
        "torchrun tells each process": "local_rank rank world_size nproc_per_node nnodes backend",
        "the loss of Switch and Mixtral is another one for other micro-batches (layers/moe.py); "
        "--moe_bias_lr= and --moe_sequence_loss= keep loads even": (
            "aux_loss_coef aux_loss_coeff router_aux_loss_coef moe_aux_loss_coeff "
            "moe_load_balancing_type moe_router_load_balancing_type"
        ),
        "an expert has no limit, so no token is dropped": (
            "capacity_factor expert_capacity moe_expert_capacity_factor moe_token_dropping "
            "drop_tokens"
        ),
        "every N-th layer has experts, N = --moe_every": (
            "first_k_dense_replace n_dense_layers num_dense_layers mlp_only_layers"
        ),
        "a token chooses among all experts, and its gates have no factor": (
            "n_group topk_group n_expert_groups n_limited_groups num_expert_groups "
            "routed_scaling_factor route_scale moe_router_topk_scaling_factor"
        ),
        "it is always so here": (
            "moe_grouped_gemm use_grouped_mm "
            "pin_memory overlap_comm contiguous_gradients auto_wrap_policy sync_module_states "
            "limit_all_gathers gradient_as_bucket_view"
        ),
        "there is no evaluation alone; a run evaluates every --eval_every= steps": "eval_only",
    }.items()
    for there in names.split()
}

# DeepSpeed's zero_optimization.stage -> our layout.
STAGES = {"0": "data_parallel=ddp", "2": "data_parallel=zero2", "3": "data_parallel=zero3"}

# nanoGPT's files of settings -> what to type for them.
RECIPES = {
    "train_gpt2.py": "configs/gpt2_124m.toml",
    "train_shakespeare_char.py": "configs/nanogpt_cpu.toml --data=shakespeare",
    "finetune_shakespeare.py": "--init_from=RUN --data=shakespeare",
}

# Flags that name a file of settings elsewhere.
RECIPE_FLAGS = (
    "config",
    "config_file",
    "config_path",
    "job.config_file",
    "cfg",
    "deepspeed_config",
)
