"""Mistakes in the commands of encoder distillation, and the files that they name; laid out as in `bad_inputs`."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.encoders import encoder_tokenizer, make
from tests.recipes.command_lines import write_csv
from tests.recipes.conftest import Encoders, labelled_rows

BOTH, GENERAL, TASK = ("encoder_kd",), ("encoder_kd (general)",), ("encoder_kd (task)",)
PRESET = ("encoder_kd (preset)",)
ONE_STAGE = (*GENERAL, *TASK)
EACH = (*BOTH, *ONE_STAGE)


def make_encoder_files(here: Path, encoders: Encoders) -> None:
    """Writes data and checkpoints, sound ones and others."""
    shutil.copytree(encoders.general, here / "encoder")
    shutil.copytree(encoders.task, here / "classifier")
    shutil.copytree(encoders.regression, here / "regressor")
    rows = labelled_rows(40)
    write_csv(here / "texts.csv", rows)
    write_csv(here / "blank_text.csv", [*rows[:2], {**rows[2], "text": ""}, *rows[3:]])
    write_csv(here / "blank_label.csv", [*rows[:2], {**rows[2], "label": ""}, *rows[3:]])
    write_csv(here / "other_labels.csv", [*rows[:2], {**rows[2], "label": "huge"}, *rows[3:]])
    write_csv(here / "more_classes.csv", [*rows[:2], {**rows[2], "number": 3}, *rows[3:]])
    write_csv(here / "infinite_score.csv", [*rows[:2], {**rows[2], "score": "inf"}, *rows[3:]])
    write_csv(here / "few_texts.csv", rows[:5])
    (here / "list_labels.jsonl").write_text("".join(json.dumps({**row, "label": ["low"]}) + "\n" for row in rows))

    def save(name: str, model, tokenizer=None) -> None:
        model.save_pretrained(here / name)
        (tokenizer or encoder_tokenizer()).save_pretrained(here / name)

    tokenizer = encoder_tokenizer()
    tokenizer.add_tokens(["w99"])
    save("other_words", make(layers=4, head="tokens", vocab_size=40), tokenizer)
    save("other_classes", make(layers=4, head="classes", num_labels=3, vocab_size=40), tokenizer)
    save("four_heads", make(layers=2, heads=4))
    save("narrow", make(layers=2, width=8))
    save("headless", make(layers=4))
    save("other_shapes", make(layers=2, width=8))
    config = json.loads((here / "other_shapes" / "config.json").read_text())
    (here / "other_shapes" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    save("few_places", make(layers=2, max_position_embeddings=8))
    save("t5_pair", make("t5", layers=4))
    save("two_labels", make(layers=4, head="classes", num_labels=2))
    for name, model in (
        ("of_nothing", None),
        ("of_what_is_gone", "./gone"),
        ("of_encoder", "encoder"),
        ("torn", "encoder"),
    ):
        (here / name).mkdir()
        config = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "base_model_name_or_path": model}
        (here / name / "adapter_config.json").write_text(json.dumps(config))
        save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, here / name / "adapter_model.safetensors")
    (here / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    tokenizer = encoder_tokenizer()
    tokenizer.mask_token = None
    save("without_mask", make(layers=4, head="tokens"), tokenizer)
    for name, change in (("nan_encoder", float("nan")), ("half_encoder", None)):
        shutil.copytree(encoders.general, here / name)
        weights = load_file(here / name / "model.safetensors")
        if change is None:
            weights = {key: tensor for key, tensor in weights.items() if ".layer.3." not in key}
        else:
            weights["bert.embeddings.word_embeddings.weight"][3] = torch.tensor(change)
        save_file(weights, here / name / "model.safetensors", metadata={"format": "pt"})


ENCODER_CASES = [
    # several teachers
    (GENERAL, "--losses mlm_ce --more_teachers encoder", "--more_teachers ['encoder'] has no effect without a --teac"),
    (
        GENERAL,
        "--more_teachers encoder --teacher_weighting fixed",
        "no effect without --more_teachers of a task stage",
    ),
    (TASK, "--teacher_weighting fixed", "--teacher_weighting fixed has no effect without --more_teachers"),
    (TASK, "--teacher_weighting validation", "--teacher_weighting validation: choose one of per_example, fixed"),
    (TASK, "--more_teachers two_labels", "--more_teachers two_labels has other classes than classifier"),
    (TASK, "--more_teachers headless", "The teacher 'headless' has not a classification head"),
    (TASK, "--more_teachers nowhere", "nowhere"),
    (TASK, "--train_along classifier", "trained together on labels alone (stage task, losses hard_ce)"),
    (
        TASK,
        "--losses hard_ce --train_along classifier",
        "together with --student, in one task stage: name that student",
    ),
    (TASK, "--losses hard_ce --student classifier --train_along other_classes", "have different tokenizers"),
    # data
    (GENERAL, "--source_column mr", "`--source_column mr` is not in the data; its columns are: text, next, label"),
    (TASK, "--task_source_column mr", "`--task_source_column mr` is not in the data; its columns are: text, next"),
    (TASK, "--label_column class", "`--label_column class` is not in the data; its columns are: text, next, label"),
    (TASK, "--label_column text", "`--label_column text` is another column of this data too; name another"),
    (GENERAL, "--pair_column text", "`--pair_column text` is another column of this data too; name another"),
    (GENERAL, "--dataset nowhere.csv", "Dataset nowhere.csv does not exist; check the path"),
    (TASK, "--task_dataset nowhere.csv", "Dataset nowhere.csv does not exist; check the path"),
    (GENERAL, "--dataset empty.csv", "empty.csv is empty"),
    (GENERAL, "--dataset blank_text.csv", "Row 3: column `text` is empty; drop the row or fill it in"),
    (TASK, "--task_dataset blank_label.csv", "Row 3: column `label` is empty; drop the row or fill it in"),
    (TASK, "--task_dataset list_labels.jsonl", "column `label` holds ['low'], which is no label: a name or a number"),
    (
        TASK,
        "--task_dataset other_labels.csv",
        "Column `label` holds 'huge', which is none of the 3 classes: 'low' (0), 'mid' (1), 'high' (2)",
    ),
    (
        TASK,
        "--task_dataset more_classes.csv --label_column number",
        "Column `number` holds 3, which is none of the 3 classes",
    ),
    (TASK, "--label_column score", "which is none of the 3 classes: 'low' (0), 'mid' (1), 'high' (2)"),
    (TASK, "--task_teacher two_labels", "which is none of the 2 classes: 'LABEL_0' (0), 'LABEL_1' (1)"),
    (TASK, "--task_teacher regressor", "Column `label` holds 'high', and the task is to predict numbers"),
    (
        TASK,
        "--task_teacher regressor --label_column score --task_dataset infinite_score.csv",
        "Column `score` holds inf, and the task is to predict numbers",
    ),
    (GENERAL, "--dataset few_texts.csv", "5 rows are too few to hold some out: give --eval_dataset"),
    (TASK, "--task_dataset few_texts.csv", "5 rows are too few to hold some out: give --task_eval_dataset"),
    (GENERAL, "--eval_split test", "--eval_split test is a split of --eval_dataset: give that too"),
    (TASK, "--task_eval_split test", "--task_eval_split test is a split of --task_eval_dataset: give that too"),
    (TASK, "--eval_dataset texts.csv", "--eval_dataset texts.csv is for a general stage, and there is none"),
    (GENERAL, "--task_eval_dataset texts.csv", "--task_eval_dataset texts.csv is for a task stage, and there is none"),
    (GENERAL, "--max_rows 0", "--max_rows 0 is out of range"),
    (TASK, "--task_max_rows 0", "--task_max_rows 0 is out of range"),
    (GENERAL, "--dataset_revision v1", "--dataset_revision v1 is for what is on the Hub, and texts.csv is here"),
    (TASK, "--task_revision v1", "--task_revision v1 is for what is on the Hub, and texts.csv is here"),
    (TASK, "--task_config v1", "--task_config v1 is for what is on the Hub, and texts.csv is here"),
    (
        GENERAL,
        "--stages general task --losses hidden_mse",
        "A task stage learns from a task's texts: give --task_data",
    ),
    (TASK, "--stages general task --losses logits_kl", "A general stage learns from texts: give --dataset"),
    # losses, maps and stages
    (GENERAL, "--losses hiden_mse", "losses = 'hiden_mse': there is no ingredient 'hiden_mse'. Write a sum such as"),
    (GENERAL, "--losses hidden_mse+hidden_mse", "hidden_mse is there twice"),
    (GENERAL, "--losses 0*hidden_mse", "the weight '0' of hidden_mse is no number above 0"),
    (GENERAL, "--losses=-1*hidden_mse", "the weight '-1' of hidden_mse is no number above 0"),
    (GENERAL, "--losses x*hidden_mse", "the weight 'x' of hidden_mse is no number above 0"),
    (GENERAL, "--losses ''", "losses = '': name at least one of: embedding_mse"),
    (GENERAL, "--losses hard_ce", "losses of stage 1: hard_ce is for a task stage, and this is a general stage"),
    (TASK, "--losses mlm_ce", "losses of stage 1: mlm_ce is for a general stage, and this is a task stage"),
    (GENERAL, "--losses mlm_ce --mlm_probability 0", "mlm_probability = 0 with mlm_ce in the losses"),
    (GENERAL, "--losses nsp_ce", "nsp_ce learns which text follows which: name the second one's column with --pair"),
    (GENERAL, "--stages pretraining", "stages = pretraining: choose 'general' or 'task', not 'pretraining'"),
    (BOTH, "--losses hidden_mse logits_kl hard_ce", "losses has 3 values, and there are 2 stages: give one for each"),
    (BOTH, "--temperature 1 2 3", "temperature has 3 values, and there are 2 stages"),
    (BOTH, "--stage_max_steps 1 2 3", "stage_max_steps has 3 values, and there are 2 stages"),
    (BOTH, "--load_best_model_at_end True --eval_strategy steps", "The best checkpoint is one of a stage"),
    (BOTH, "--resume_from_checkpoint out", "is of one stage, and there are 2: --resume goes on with the stage"),
    (
        GENERAL,
        "--layer_map middle",
        "layer_map = middle does not go with 2 layers of the student and 4 of the teacher",
    ),
    (GENERAL, "--layer_map single=5", "it leads to layer 5 of the teacher, which has layers 1 to 4"),
    (GENERAL, "--layer_map 3:1", "it leads to layer 3 of the student, which has layers 1 to 2"),
    (GENERAL, "--num_layers 1 --layer_map skip", "of a student with 1 layers it leaves none"),
    (GENERAL, "--num_layers 6", "init = uniform: it leads to layer 0 of the teacher, which has layers 1 to 4"),
    (GENERAL, "--temperature 0", "temperature = [0.0] is out of range"),
    (
        GENERAL,
        "--relation_heads 3 --losses key_relation_kl",
        "3 relation heads do not divide the student's keys of wid",
    ),
    (GENERAL, "--relation_heads 0", "relation_heads = 0 is out of range"),
    (GENERAL, "--max_length 100", "--max_length 100: the student has positions for 64 tokens; lower it to that"),
    (GENERAL, "--mlm_probability 1", "mlm_probability = 1.0 is out of range"),
    (TASK, "--stage_learning_rates nan", "stage_learning_rates = [nan] is out of range"),
    (TASK, "--stage_epochs 0", "stage_epochs = [0.0] is out of range"),
    # what a preset cannot bridge
    (
        PRESET,
        "--config minilm --student four_heads",
        "the student has 4 heads, the teacher 2. Use query_, key_ and va",
    ),
    (PRESET, "--config minilm --num_heads 4", "(preset minilmv2), or make num_heads 2"),
    (
        GENERAL,
        "--losses attention_mse --num_heads 4",
        "attention_mse compares attention head by head: the student has",
    ),
    (
        GENERAL,
        "--losses cosine --hidden_size 8",
        "cosine compares states of one width: the student's is 8, the teache",
    ),
    (PRESET, "--config distilbert --hidden_size 8", "Use hidden_mse, which has a learned projection"),
    (
        PRESET,
        "--config pkd --student narrow",
        "cls_mse compares states of one width: the student's is 8, the teacher's",
    ),
    (PRESET, "--config tinybert --num_heads 4", "attention_mse compares attention head by head"),
    (PRESET, "--config mix --num_heads 4", "attention_mse compares attention head by head"),
    # teachers and students
    (GENERAL, "--teacher ./nowhere", "`--teacher ./nowhere` is not a directory"),
    (TASK, "--task_teacher files", "`--task_teacher files` is a directory without config.json"),
    (GENERAL, "--teacher config_is_text", "config_is_text/config.json' is not a valid JSON file"),
    (GENERAL, "--teacher of_nothing", "adapter_config.json does not name the model that the adapters are for"),
    (GENERAL, "--teacher of_what_is_gone", "--teacher of_what_is_gone, whose adapters are for ./gone` is not a direc"),
    (GENERAL, "--teacher torn", "adapter_model.safetensors is damaged (Error while deserializing header"),
    (TASK, "--task_teacher of_encoder", "The teacher 'of_encoder' has not a classification head (classifier.bias"),
    (GENERAL, "--teacher vision", "(model type 'vit') is of an architecture for which transformers has no model with"),
    (GENERAL, "--teacher other_words --student encoder", "Teacher and student have different tokenizers (31 and 30"),
    (
        BOTH,
        "--task_teacher other_classes --label_column number",
        "'w99' is 30 for the teacher and missing for the student). Layers are comp",
    ),
    (
        GENERAL,
        "--teacher headless --losses logits_kl",
        "The teacher 'headless' has not a language-modelling head (cls.",
    ),
    (
        TASK,
        "--task_teacher encoder",
        "The teacher 'encoder' has not a classification head (classifier.bias is missing)",
    ),
    (GENERAL, "--teacher without_mask --losses mlm_ce+hidden_mse", "mlm_ce needs a mask token, and the tokenizer has"),
    (GENERAL, "--student few_places", "--max_length 32: the student has positions for 8 tokens; lower it to that"),
    (GENERAL, "--student t5_pair", "The student has encoder and decoder, the teacher encoder: choose two encoders"),
    (GENERAL, "--student encoder --num_layers 2", "--num_layers 2 is for a new student, and --student encoder names"),
    (GENERAL, "--student encoder --init random", "--init random is for a new student, and --student encoder names"),
    (GENERAL, "--num_heads 3", "hidden_size 16 of the new student is not divisible by num_heads 3"),
    (GENERAL, "--init middle", "init = middle: choose one of uniform, top, bottom, skip, last, single"),
    (
        GENERAL,
        "--hidden_size 8 --init uniform",
        "init = uniform: layers of the teacher fit a student of its sizes only",
    ),
    (GENERAL, "--num_layers 0", "--num_layers 0 is out of range"),
    (GENERAL, "--teacher_dtype float8", "Unknown dtype 'float8'; choose one of: auto, float32"),
    (GENERAL, "--teacher_revision v1", "--teacher_revision v1 is for what is on the Hub, and encoder is here"),
    (
        TASK,
        "--task_teacher_revision v1",
        "--task_teacher_revision v1 is for what is on the Hub, and classifier is here",
    ),
    (ONE_STAGE, "--lora_r 4", "--lora_r 4 has no effect without --use_peft"),
    (ONE_STAGE, "--merge_adapters", "--merge_adapters True has no effect without --use_peft"),
    (
        EACH,
        "--use_peft",
        "--use_peft saves adapters alone, which can be used again only for one task stage of a --stu",
    ),
    (TASK, "--use_peft --student of_encoder", "--use_peft makes new adapters, and --student of_encoder are adapters"),
    (
        TASK,
        "--use_peft --losses hard_ce --student encoder --train_along encoder",
        "--use_peft goes with one encoder, and --train_along names others",
    ),
    (
        ONE_STAGE,
        "--use_peft --merge_adapters --lora_target_modules nowhere",
        "--use_peft with --lora_target_modules nowhere: peft_config does not fit the student: ",
    ),
    # settings that all trainers share
    (EACH, "--learning_rate nan", "learning_rate = nan is out of range: 0 or more, up to 10"),
    (
        ONE_STAGE,
        """--gradient_checkpointing_kwargs '{"use_reentrant": true}'""",
        "is not supported: layers are recomputed in one way",
    ),
    (ONE_STAGE, "--torch_compile True", "torch_compile = True is not supported: compiled layers have no hooks"),
    (ONE_STAGE, "--fsdp full_shard", "FSDP gathers weights for the whole forward pass only. Use DeepSpeed"),
    (ONE_STAGE, "--train_sampling_strategy group_by_length", "texts have no length yet; choose random"),
    (ONE_STAGE, "--remove_unused_columns True", "remove_unused_columns must stay False"),
    (ONE_STAGE, "--metric_for_best_model bleau --eval_strategy steps", "Unknown metric 'bleau'"),
    (TASK, "--load_best_model_at_end True", "The best checkpoint is found by evaluating: set eval_strategy to steps"),
    (EACH, "--output_dir finished", "finished holds the results of a run (finished.json). Name another directory"),
    (EACH, "--output_dir begun", "begun holds checkpoint-1 of a run that did not finish: --resume goes on with it"),
    (EACH, "--output_dir a_file", "--output_dir a_file is a file: name a directory"),
    ((*BOTH, *GENERAL), "--output_dir encoder", "is what --teacher encoder reads, which would be overwritten"),
    (
        ONE_STAGE,
        "--resume",
        "no checkpoint in out to go on from. Begin without --resume, and save some with --save_steps",
    ),
    (BOTH, "--resume", "no checkpoint in out to go on from. Begin without --resume, and save some with --save_steps"),
    (ONE_STAGE, "--resume --resume_from_checkpoint files", "are two checkpoints: give one of them"),
    (ONE_STAGE, "--resume_from_checkpoint files", "--resume_from_checkpoint files is no checkpoint of a run"),
    (ONE_STAGE, "--layr_map top", "unknown flag --layr_map; did you mean --layer_map"),
    (ONE_STAGE, "--config gkd", "gkd is a preset of kd, not of encoder_kd"),
    (ONE_STAGE, "--config misspelt_key.yaml", "misspelt_key.yaml: unknown key sorce_column; did you mean"),
]
ENCODER_LOADED_CASES = [
    (
        GENERAL,
        "--teacher nan_encoder",
        "weights that are NaN or infinite, in embeddings.word_embeddings.weight: it was destroyed",
    ),
    (GENERAL, "--teacher half_encoder", "is incomplete: 16 of its weights are not in the checkpoint (encoder.layer.3"),
    (GENERAL, "--teacher of_encoder", "The adapters in 'of_encoder' cannot be merged into their model 'encoder'"),
    (ONE_STAGE, "--student other_shapes", "its weights have other shapes than its config.json says"),
    (GENERAL, "--student half_encoder", "is incomplete: 16 of its weights are not in the checkpoint"),
]
