"""Model folders: how weights leave a run and come back."""

from bigdssm.export.model_folder import ModelFolder, load_model_folder, save_model_folder

__all__ = ["ModelFolder", "load_model_folder", "save_model_folder"]
