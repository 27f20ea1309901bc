// Export the annotations of all images of the open project as GeoJSON, for prepare_data.
//
// Save what you have corrected (File > Save), set `folder`, Run. Then:
//
//     python workflows/prepare_data.py data.images=<images> data.annotations=<folder> out=<new cohort>
//
// An image without annotations is written as a field without targets: take images that nobody has looked at out of the
// project, or their files out of the folder. Shapes need a class (set it in the Annotations tab); those without one are
// called Unclassified. Written for QuPath 0.4 and later.

import qupath.lib.io.PathIO

def folder = new File("/data/stas/corrected")

def project = getProject()
if (project == null) {
    println "Open a project first."
    return
}
folder.mkdirs()
int numShapes = 0
for (entry in project.getImageList()) {
    def id = entry.getImageName().replaceFirst(/(?i)\.(jpe?g|jpe|jfif|png|tiff?|bmp|dib|webp|jp2|j2k|svs|ndpi|mrxs|scn|bif)$/, "")
    def imageData = entry.readImageData()
    def annotations = imageData.getHierarchy().getAnnotationObjects()
    PathIO.exportObjectsAsGeoJSON(new File(folder, id + ".geojson"), annotations, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    numShapes += annotations.size()
    imageData.getServer().close()
}
println "wrote ${numShapes} annotation(s) of ${project.getImageList().size()} image(s) to ${folder}"
