"""Every configuration key: its type, default, range and meaning.

The keys of moshi-finetune keep their names, types and defaults, so that its files load unchanged;
the sections `ttt` and `parallel` and some keys are added. Reading, messages and rules over several
keys are in `launch.config`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    """Python counts True as 1; a switch in a number's place is a mistake."""
    if isinstance(value, bool):
        raise ValueError("a switch stands where a number belongs")
    return value


def _empty_is_none(value: Any) -> Any:
    """moshi-finetune's example writes '' where nothing is meant."""
    return None if value == "" else value


def _layers_text(value: Any) -> Any:
    """Bring a list of indices, or one index, to the text form `29,30,31`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return ",".join(str(item) for item in value)
        raise ValueError("a list of layers may hold whole numbers only")
    return value


# The bounds stand before the validators: in this order pydantic puts them into the JSON schema,
# from which the messages are made.
_NUMBER = BeforeValidator(_no_bool)
Int = Annotated[int, _NUMBER]
PositiveInt = Annotated[int, Field(ge=1), _NUMBER]
CountInt = Annotated[int, Field(ge=0), _NUMBER]
Float = Annotated[float, Field(allow_inf_nan=False), _NUMBER]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), _NUMBER]
Beta = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Text = Annotated[str | None, BeforeValidator(_empty_is_none)]


class Section(BaseModel):
    """Frozen; unknown keys are errors; a key's meaning is the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(Section):
    train_data: str = ""
    """a .jsonl manifest, a folder of them, or several as `path:weight,path:weight`; a weight is a
    share of what is trained on, in pieces"""
    eval_data: str = ""
    """held-out data, in the same form"""
    shuffle: bool = False
    """visit the pieces of each epoch in an order drawn from `seed`"""
    cache_dir: Text = None
    """where encoded audio goes; null: .cache/codes by the first manifest, or the user's cache"""
    prefetch: CountInt = 2
    """batches prepared ahead of the step that takes them"""
    max_inline_encode_sec: NonNegativeFloat = 3600.0
    """seconds of audio that train.py may encode by itself; more asks for launch/prepare.py"""
    max_bad_samples: CountInt = 0
    """pieces that a run, over all its ranks and starts, may leave out because their codes can't be
    read any more; at one more it stops"""


class MoshiPathsConfig(Section):
    hf_repo_id: Text = "kyutai/moshiko-pytorch-bf16"
    """a hub id, or a local folder in Kyutai's release layout"""
    mimi_path: Text = None
    """Mimi weights instead of the release's own"""
    moshi_path: Text = None
    """Moshi weights instead of the release's own"""
    tokenizer_path: Text = None
    """sentencepiece model instead of the release's own"""
    config_path: Text = None
    """config.json instead of the release's own"""


class OptimConfig(Section):
    lr: PositiveFloat = 1e-4
    """peak learning rate"""
    ttt_lr: PositiveFloat | None = None
    """peak learning rate of TTT parameters; null: lr"""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW weight decay of matrices"""
    pct_start: Fraction = 0.05
    """share of max_steps that warms up, linearly"""
    final_lr_fraction: Fraction = 0.0
    """learning rate of the last step, as a share of the peak"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the two moments"""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon"""


class LoraConfig(Section):
    enable: bool = False
    """train low-rank adapters on every linear layer of Moshi's, its own weights being frozen"""
    rank: PositiveInt = 64
    """rank of the adapters; kept on resume, as all of this section"""
    scaling: NonNegativeFloat = 2.0
    """factor of the adapters' output"""
    ft_embed: bool = False
    """with adapters: train the embeddings too"""


class WandbConfig(Section):
    project: Text = None
    """W&B project; null: no W&B"""
    run_name: Text = None
    """name of the run in W&B; null: the run folder's name"""
    key: Text = Field(default=None, repr=False)
    """refused: a key in a file leaks; use `wandb login` or WANDB_API_KEY"""
    offline: bool = False
    """write W&B files locally, for `wandb sync` later"""


class TTTSection(Section):
    enable: bool = False
    """put TTT layers into the model"""
    layers: Annotated[str, BeforeValidator(_layers_text)] = "middle"
    """none, all, middle (the middle half), or indices such as '29,30,31'"""
    inner_model: Literal["mlp", "linear"] = "mlp"
    """the network whose weights are the state"""
    base_lr: PositiveFloat = 1.0
    """inner learning rate before the gate, the head dimension and the mini-batch divide it"""
    mini_batch_size: PositiveInt = 16
    """frames that share one inner gradient step"""
    persistent_states: bool = False
    """train along recordings: TTT states and attention windows go from one piece to the next"""
    tbptt_pieces: PositiveInt = 1
    """with persistent_states: consecutive pieces that gradients go back through"""
    initial_gating_alpha: Float = 0.05
    """start of the gate: x + tanh(alpha) * TTT(x)"""
    ttt_mlp_layers: Annotated[int, Field(ge=2, le=5), _NUMBER] = 2
    """layers of the inner MLP; above 2 slower: gradient_checkpointing then runs a third forward"""
    ttt_mlp_expansion_factor: PositiveInt = 4
    """width of the inner MLP, in head dimensions"""
    ttt_layer_context: PositiveInt | None = 50
    """attention window of TTT layers, in frames of 80 ms; null: the checkpoint's"""
    non_ttt_layer_context: PositiveInt | None = 100
    """attention window of the other layers, in frames of 80 ms; null: the checkpoint's"""
    causal: bool = True
    """frame i sees no later frame of its mini-batch"""
    inner_eps: PositiveFloat = 1e-6
    """epsilon of the inner LayerNorm"""
    checkpoint_group_size: CountInt | None = None
    """mini-batches computed again together in the backward; null: the root of their number"""
    log_inner_loop_losses: bool = False
    """log TTT's health by layer: inner losses, change of the state, gates, inner learning rate"""
    inner_loop_log_interval: PositiveInt = 10
    """steps between two such logs"""
    save_inner_loop_plots: bool = False
    """at each evaluation, plot inner losses by position in held-out recordings, with JSON"""
    inner_loop_plot_dir: Text = None
    """folder for those plots; null: inner_loop in the run folder"""


class ParallelConfig(Section):
    dp_replicate: PositiveInt = 1
    """copies of the sharded model (HSDP)"""
    dp_shard: Annotated[int, Field(ge=-1), _NUMBER] = -1
    """ranks that share one copy by FSDP2; -1: the rest of the world"""
    tp: PositiveInt = 1
    """ranks that share heads, features and Depformer frames of one copy; must divide the heads"""
    reshard_after_forward: bool = True
    """free gathered parameters between forward and backward: less memory, more traffic"""
    prefetch_layers: CountInt = 1
    """layers whose parameters are gathered early, before the layer ahead of them computes"""
    recompute: Literal["layer", "selective"] = "layer"
    """with gradient_checkpointing: all of a layer but its scan, or less (attention and every second
    matrix product are kept): faster, more memory"""
    reduce_every_microbatch: bool = False
    """reduce gradients to shards after each microbatch, not each step: less memory, more traffic"""


class BadStepsConfig(Section):
    """Steps with a loss or a gradient norm that isn't finite, or a spike: left out by all ranks."""

    max_in_a_row: PositiveInt = 10
    """stop the run, with a checkpoint, after so many one after the other"""
    spike_factor: Annotated[float, Field(gt=1), _NUMBER] | None = None
    """also leave out steps whose gradient norm is above this multiple of the running one"""


class ProfileConfig(Section):
    enable: bool = False
    """write a torch profiler trace into the run folder"""
    start_step: PositiveInt = 5
    """first traced step, counted from the run's first, resumed or not"""
    num_steps: PositiveInt = 3
    """traced steps; a run resumed among them traces those left, one resumed after them warns"""


class TrainConfig(Section):
    """A whole run. Relative paths start at the working directory; `${repo}` is this checkout."""

    run_dir: str
    """folder for everything the run writes; `${time}` becomes the UTC start time"""
    data: DataConfig = Field(default_factory=DataConfig)
    moshi_paths: MoshiPathsConfig = Field(default_factory=MoshiPathsConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    ttt: TTTSection = Field(default_factory=TTTSection)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    bad_steps: BadStepsConfig = Field(default_factory=BadStepsConfig)

    seed: Annotated[int, Field(ge=0, lt=2**32), _NUMBER] = 0
    """of initial values and of the data order"""
    duration_sec: PositiveFloat | dict[CountInt, PositiveFloat] = 10.0
    """length of a piece, in seconds (12.5 frames each); or lengths by the steps done before, such
    as {0: 3, 200: 9, 400: 18}"""
    batch_size: PositiveInt = 1
    """pieces a rank takes in one forward pass"""
    num_microbatches: PositiveInt = 1
    """forward passes of a step, where global_batch_size is null"""
    global_batch_size: PositiveInt | None = None
    """pieces of a step over all ranks; null: batch_size * num_microbatches * dp"""
    num_lanes: PositiveInt | None = None
    """with ttt.persistent_states: recordings side by side, over all ranks; null: batch_size * dp"""
    max_steps: PositiveInt = 100
    """optimizer steps of the whole run"""
    max_norm: PositiveFloat = 1.0
    """gradients are clipped to this norm"""
    first_codebook_weight_multiplier: NonNegativeFloat = 1.0
    """loss weight of the first audio codebook"""
    text_padding_weight: NonNegativeFloat = 0.5
    """loss weight of text padding"""

    full_finetuning: bool = False
    """train every parameter; false trains TTT layers and LoRA adapters alone"""
    gradient_checkpointing: bool = True
    """recompute each layer in the backward pass"""
    param_dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """dtype of compute; auto: bfloat16 on a GPU, float32 on a CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    deterministic: bool = False
    """same numbers on every run, slower"""
    compile: bool = False
    """torch.compile every layer: faster steps, a slow first one"""

    log_freq: PositiveInt = 1
    """steps between two logged ones"""
    do_eval: bool = False
    """evaluate on data.eval_data"""
    eval_freq: CountInt = 0
    """steps between two evaluations; 0: after the last step alone"""
    eval_batches: PositiveInt | None = None
    """global batches of an evaluation (with ttt.persistent_states: recordings of each lane); null:
    all of eval_data"""
    do_ckpt: bool = True
    """write checkpoints; false: none at all, not even where the run is stopped"""
    ckpt_freq: Int = 0
    """steps between two checkpoints; below 1: after the last step alone"""
    num_ckpt_keep: PositiveInt | None = 3
    """newest checkpoints to keep; null: all"""
    ckpt_keep_every: PositiveInt | None = None
    """steps; checkpoints after a multiple of it are kept too"""
    timeout_sec: PositiveFloat = 1800.0
    """end the run, saying where, if a collective, step or evaluation batch takes longer"""
    save_adapters: bool = True
    """of moshi-finetune, without effect: checkpoints hold base weights and adapters apart"""
    overwrite_run_dir: bool = False
    """refused where true: nothing is ever deleted here"""
    resume: bool = False
    """go on with the run in run_dir"""
    tensorboard: bool = True
    """write TensorBoard events"""
