"""A CLIP model of open_clip, with its tokenizer and preprocessing."""

from matex_pl.clip.load import cut_text, input_size, load_clip, load_tokenizer, load_trained
from matex_pl.clip.model import Clip

__all__ = ["Clip", "cut_text", "input_size", "load_clip", "load_tokenizer", "load_trained"]
