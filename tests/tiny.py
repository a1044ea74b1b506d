"Tiny models with random weights, in the folder formats that the study reads."

from pathlib import Path
import json
import torch

CAPTIONS = [
    "a red cat in a meadow",
    "a small blue boat on a beach",
    "two green cups in a room",
    "a yellow star at night",
    "the picture shows a large striped umbrella at the top left",
]


def tokenizer(context=24):
    "A byte-pair tokenizer whose end-of-text has the highest number."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    raw.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<unk>"]
        ),
    )
    raw.add_special_tokens(["<start>", "<end>"])
    start, end = raw.token_to_id("<start>"), raw.token_to_id("<end>")
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=context,
    )


def open_clip_folder(folder, seed=0):
    "A CLIP of open_clip: 64 pixels, patches of 16."
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tok = tokenizer()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=64, layers=2, width=64, head_width=32, patch_size=16),
        text_cfg=dict(context_length=24, vocab_size=len(tok), width=32, heads=2, layers=2, hf_tokenizer_name="local"),
    )
    model = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = dict(mean=[0.5, 0.45, 0.4], std=[0.27, 0.26, 0.28], interpolation="bicubic", resize_mode="shortest")
    (folder / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=config, preprocess_cfg=preprocess)), encoding="utf-8"
    )
    tok.save_pretrained(folder)
    return folder


def siglip_folder(folder, seed=1):
    "A sigmoid-loss dual encoder of transformers: 64 pixels, patches of 16."
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(seed)
    tok = tokenizer(16)
    tok.model_input_names = ["input_ids"]
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = SiglipConfig(
        text_config=dict(
            common,
            vocab_size=len(tok),
            max_position_embeddings=16,
            projection_size=32,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        ),
        vision_config=dict(common, image_size=64, patch_size=16),
    )
    SiglipModel(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    SiglipImageProcessor(size=dict(height=64, width=64), image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    return Path(folder)


def hf_clip_folder(folder, seed=2):
    "A CLIP of transformers."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tok = tokenizer(16)
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=dict(
            common,
            vocab_size=len(tok),
            max_position_embeddings=16,
            eos_token_id=tok.eos_token_id,
            bos_token_id=tok.bos_token_id,
            pad_token_id=tok.pad_token_id,
        ),
        vision_config=dict(common, image_size=64, patch_size=16),
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    CLIPImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=64, width=64)).save_pretrained(folder)
    return Path(folder)


def generator_folder(folder, seed=3):
    "A latent diffusion pipeline: 32 pixels, 8 x 8 latents."
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tok = tokenizer(16)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    with torch.no_grad():
        vae.decoder.layers[-1].weight.mul_(8)
        vae.decoder.layers[-1].bias.fill_(0.5)  # neither black nor white
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=tok.eos_token_id,
            bos_token_id=tok.bos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    pipe = StableDiffusionPipeline(
        vae,
        text,
        tok,
        unet,
        DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return Path(folder)
