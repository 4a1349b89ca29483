"""ComfyUI's door into AttnScope when the repository lies in ``custom_nodes``."""

WEB_DIRECTORY = "./comfy_plugin/web"


async def comfy_entrypoint() -> object:
    # Imported late: the server imports this package too, where ComfyUI does not exist.
    from .comfy_plugin.extension import AttnScopeExtension

    return AttnScopeExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
