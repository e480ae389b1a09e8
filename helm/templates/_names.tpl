{{/* Names and labels. Every helper takes the root context unless it says otherwise. */}}

{{- define "latentwatch.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough that every suffix of this chart fits into 63 characters. */}}
{{- define "latentwatch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "latentwatch.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "latentwatch.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Args: root, component. These are in selectors, which Kubernetes never lets change: nothing that varies between versions may stand here. */}}
{{- define "latentwatch.selectorLabels" -}}
app.kubernetes.io/name: {{ include "latentwatch.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Args: root, component. */}}
{{- define "latentwatch.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "latentwatch.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: latentwatch
{{- end -}}

{{/* Args: root, component. Of pods: a new version of the chart alone changes none of these, so it restarts no server. */}}
{{- define "latentwatch.podLabels" -}}
{{ include "latentwatch.selectorLabels" . }}
app.kubernetes.io/part-of: latentwatch
{{- end -}}

{{/* On every pod whose engine streams to this release, whoever made the pod: the PodMonitor and the NetworkPolicy select by it. */}}
{{- define "latentwatch.watchedLabel" -}}
latentwatch/release: {{ include "latentwatch.fullname" . }}
{{- end -}}

{{/* Args: an image with repository, tag, digest; the default tag. */}}
{{- define "latentwatch.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default (index . 1) $image.tag }}
{{- end -}}
{{- end -}}

{{/* The Secret with the token that is asked for over HTTP, as YAML: yours, else the one that this chart makes; nothing with httpOpen. */}}
{{- define "latentwatch.httpToken" -}}
{{- if .Values.httpToken -}}
{{ toYaml .Values.httpToken }}
{{- else if not .Values.httpOpen -}}
name: {{ include "latentwatch.fullname" . }}-http
key: token
{{- end -}}
{{- end -}}

{{/* Names under which the collector is asked over HTTP, as a YAML list: those of its Service, and yours. */}}
{{- define "latentwatch.httpHosts" -}}
{{- $service := printf "%s-%s" (include "latentwatch.fullname" .) (ternary "collector" "vllm" (eq .Values.mode "gateway")) -}}
{{- if or (eq .Values.mode "gateway") .Values.vllm.enabled }}
{{- $inside := printf "%s.%s" $service .Release.Namespace }}
{{ toYaml (list $service $inside (printf "%s.svc" $inside) (printf "%s.svc.%s" $inside .Values.clusterDomain)) }}
{{- end }}
{{- with .Values.collector.httpHosts }}
{{ toYaml . }}
{{- end }}
{{- if and .Values.ingress.enabled .Values.ingress.host }}
{{ toYaml (list .Values.ingress.host) }}
{{- end }}
{{- if .Values.httpRoute.enabled }}
{{- with .Values.httpRoute.hostnames }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* "https" where the collector itself speaks TLS to readers. */}}
{{- define "latentwatch.httpScheme" -}}
{{ ternary "https" "http" (ne .Values.httpTls.secretName "") }}
{{- end -}}

{{/* Host and port at which engines reach the gateway. */}}
{{- define "latentwatch.gatewayAddress" -}}
{{ include "latentwatch.fullname" . }}-collector.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.collector.grpcPort }}
{{- end -}}
