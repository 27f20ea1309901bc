// Import a folder of GeoJSON results into all images of the open project.
//
// 1. QuPath: create a project and add the images that were scored.
// 2. Automate > Script editor, open this file, set `folder`, Run.
//
// The folder is geojson/ of score_images or of export: <id>.geojson or <id>.geojson.gz, where <id> is the image's file
// name without its suffix. An image that has annotations of the imported classes is left alone, so that the script can be
// run again without doubling targets or losing corrections. Written for QuPath 0.4 and later.

import java.util.zip.GZIPInputStream
import qupath.lib.io.PathIO

def folder = "/data/stas/to_correct/geojson"
def classNames = ["STAS", "proposed", "questioned"]

def project = getProject()
if (project == null) {
    println "Open a project with the scored images first."
    return
}
int numImported = 0
def without = []
def keeping = []
for (entry in project.getImageList()) {
    def id = entry.getImageName().replaceFirst(/(?i)\.(jpe?g|jpe|jfif|png|tiff?|bmp|dib|webp|jp2|j2k|svs|ndpi|mrxs|scn|bif)$/, "")
    def file = [new File(folder, id + ".geojson"), new File(folder, id + ".geojson.gz")].find { it.isFile() }
    if (file == null) {
        without << entry.getImageName()
        continue
    }
    def imageData = entry.readImageData()
    def hierarchy = imageData.getHierarchy()
    if (hierarchy.getAnnotationObjects().any { it.getPathClass()?.toString() in classNames }) {
        keeping << entry.getImageName()
    } else {
        file.withInputStream { stream ->
            def unpacked = file.name.endsWith(".gz") ? new GZIPInputStream(stream) : stream
            hierarchy.addObjects(PathIO.readObjectsFromGeoJSON(unpacked))
        }
        entry.saveImageData(imageData)
        numImported++
    }
    imageData.getServer().close()
}
println "imported into ${numImported} image(s) of ${project.getImageList().size()}"
if (!keeping.isEmpty())
    println "left alone, as they have annotations of these classes: ${keeping.join(', ')}"
if (!without.isEmpty())
    println "without a file in ${folder}: ${without.join(', ')}"
println "Open an image again to see its targets."
