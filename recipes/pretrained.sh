# Learning without labels: what each kind of starting weights is worth with 10, 25 and 100 % of the labels.
#   sh recipes/pretrained.sh busi --data data/BUSI --positive malignant
#   sh recipes/pretrained.sh breastmnist --data breastmnist
# Two of its runs in pairs: python train.py --resume runs/busi-imagenet-1 --against runs/busi-simclr-1
# IMAGENET=FILE takes the ImageNet weights from a file instead of torchvision's download.
set -e
name=$1
shift
for method in simclr byol; do
    python pretrain.py --method $method --model mobilenet_v2 --size 64 --epochs 60 --name $name-$method "$@"
done
for share in 0.1 0.25 1; do
    for start in none simclr byol imagenet; do
        case $start in
            none) weights=none ;;
            imagenet) weights=${IMAGENET:-imagenet} ;;
            *) weights=runs/$name-$start/backbone.pt ;;
        esac
        against=$([ $start = none ] || echo --against runs/$name-none-$share)
        python train.py @recipes/pretrained.args --weights "$weights" --label-fraction $share $against --name $name-$start-$share "$@"
    done
done
