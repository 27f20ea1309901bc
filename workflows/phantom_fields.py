"""Phantom fields with their annotations and groups: made once, in a folder that their settings name."""

from dataclasses import dataclass

from stas_core import storage
from stas_core.data.images import encode_jpeg
from stas_core.data.phantom import PhantomConfig, make_phantom, phantom_id
from workflows.cluster import ray_session
from workflows.field_inputs import Item
from workflows.waiting import Need, results


@dataclass(frozen=True)
class PhantomFields:
    """The phantom fields of a cohort."""

    phantom: PhantomConfig
    out: str
    """Folder of the cohort; path or URI."""

    @property
    def images(self) -> str:
        """Return the folder of the images."""
        return storage.join(self._folder, "images")

    @property
    def annotations(self) -> str:
        """Return the folder of the annotations."""
        return storage.join(self._folder, "annotations")

    @property
    def groups_csv(self) -> str:
        """Return the table of the groups."""
        return storage.join(self._folder, "groups.csv")

    @property
    def _folder(self) -> str:
        return storage.join(self.out, "phantom", storage.fingerprint(self.phantom.model_dump_json()))

    def are_made(self) -> bool:
        """Tell whether all are there."""
        return storage.exists(self.groups_csv)  # written last

    def make(self) -> None:
        """Make all, as Ray tasks.

        Raises:
            ResourceError: nodes were lost, and what is left has no room for a task.
        """
        import ray

        def make(index: int) -> str:
            return self.write(index)

        print(f"making {self.phantom.num_images} phantom fields of {self.phantom.width}x{self.phantom.height} px")
        with ray_session():
            making = [ray.remote(make).remote(index) for index in range(self.phantom.num_images)]
            rows = results(making, Need("the making of a field").look)
        self.write_groups(rows)

    def write(self, index: int) -> str:
        """Write a field and its annotation; return its row of the table of groups."""
        made, name = make_phantom(self.phantom, index), phantom_id(index)
        storage.write_bytes(storage.join(self.images, f"{name}.jpg"), encode_jpeg(made.image))
        storage.write_bytes(storage.join(self.annotations, f"{name}.json"), made.labelme)
        return f"{name},{made.group}"

    def write_groups(self, rows: list[str]) -> None:
        """Write the table of groups."""
        storage.write_bytes(self.groups_csv, "\n".join(["image_id,group", *rows, ""]).encode())

    def item(self, index: int) -> Item:
        """Write a field and its annotation; return it."""
        name = self.write(index).partition(",")[0]
        image, annotation = storage.join(self.images, f"{name}.jpg"), storage.join(self.annotations, f"{name}.json")
        return Item(id=name, image_uri=image, annotation_uri=annotation, stamp="")
