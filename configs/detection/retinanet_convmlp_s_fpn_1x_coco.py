# ./dist_detection.sh configs/detection/retinanet_convmlp_s_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 37.2 (AP50 56.4, AP75 39.8); 18.7 M parameters
_base_ = ["_base_/retinanet_fpn.py", "_base_/coco_detection.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
