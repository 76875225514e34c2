"""How a network is shared: a folder of weights and `config.json`, on disk or on Hugging Face's hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from superglobal.errors import InputError, first_line

if TYPE_CHECKING:
    from superglobal.models.network import RetrievalNetwork


class HubModel(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, strict: a network comes back as it was, or not at all.

    The folder's format is that of superglobal/sharing.py, its card that of superglobal/card.py.
    """

    # What leads to files imports this module, so it is imported where it is used.

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `model.safetensors`, `config.json` and, if there is none, the model card `README.md` into a folder.

        Args:
            save_directory: made if it is not there.
            options: of `ModelHubMixin.save_pretrained`; `model_card_kwargs` goes to `superglobal.card.model_card`.

        Raises:
            InputError: a network that could not be loaded again, or a place that cannot be written.
        """
        try:
            return super().save_pretrained(save_directory, **options)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{save_directory}: cannot be written ({reason}); choose another place") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> RetrievalNetwork:
        """The network of a folder that `save_pretrained` wrote, or of a repository of the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name".
            revision: branch, tag or commit of the repository.
            force_download, token, cache_dir, local_files_only: of the download, as huggingface_hub has them.
            settings: of `superglobal.load_model` (pooling, scales, antialias, trainable), over the stored ones.

        Raises:
            InputError: no such folder or repository; unknown or missing fields, keys or shapes, by name.
        """
        from superglobal.models.factory import load_model
        from superglobal.models.shared_folder import fetch, hub_name

        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return load_model(folder, **settings)
        name, options = str(pretrained_model_name_or_path), {"token": token, "cache_dir": cache_dir}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        network = load_model(fetch(name, revision, **options), **settings)
        network.weights_label = hub_name(name, revision)
        return network

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, made if it is not there.

        Args:
            repo_id: "owner/name"; `hf auth login` beforehand.
            options: of `ModelHubMixin.push_to_hub` (private, token, branch, commit_message, model_card_kwargs, ...).

        Returns:
            The address of the commit.

        Raises:
            InputError: a network that could not be loaded again, or what the hub refuses.
        """
        card = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        try:
            return super().push_to_hub(repo_id, model_card_kwargs=card, **options)
        except InputError:
            raise
        except Exception as error:  # hub, http and file errors share no base class
            raise InputError(
                f"{repo_id}: could not be pushed ({type(error).__name__}: {first_line(error)}); `hf auth login` "
                "with a token that may write there, and give owner/name"
            ) from error

    def generate_model_card(self: Any, **about: Any) -> ModelCard:
        """See `superglobal.card.model_card`."""
        from superglobal.reporting.model_card import model_card

        return model_card(self, **about)

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        from superglobal.models.shared_folder import write_folder

        write_folder(self, save_directory)
