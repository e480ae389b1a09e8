{{/* What the pods are made of. */}}

{{- define "latentwatch.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
fsGroup: {{ int64 .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Complete by itself: in a patched pod there is no pod security context of ours. */}}
{{- define "latentwatch.containerSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* A Secret or ConfigMap that lacks must not hold up a vLLM pod, so it is optional there: the server then starts unwatched and counts
     that. A gateway's pod waits for it and says so. */}}

{{/* Args: "watchlist" or "baseline"; its value. Where the file is in a container. */}}
{{- define "latentwatch.artifactPath" -}}
{{- $source := index . 1 -}}
/etc/latentwatch/{{ index . 0 }}/{{ with $source.configMap }}{{ .key }}{{ end }}{{ with $source.persistentVolumeClaim }}{{ .path }}{{ end }}{{ with $source.image }}{{ .path }}{{ end }}
{{- end -}}

{{/* Args: "watchlist" or "baseline"; its value; whether it is optional. */}}
{{- define "latentwatch.artifactVolume" -}}
- name: latentwatch-{{ index . 0 }}
{{- with (index . 1).configMap }}
  configMap:
    name: {{ .name }}
    {{- if index $ 2 }}
    optional: true
    {{- end }}
    items:
      - key: {{ .key }}
        path: {{ .key }}
{{- end }}
{{- with (index . 1).persistentVolumeClaim }}
  persistentVolumeClaim:
    claimName: {{ .claimName }}
    readOnly: true
{{- end }}
{{- with (index . 1).image }}
  image:
    reference: {{ .reference | quote }}
    pullPolicy: {{ default "IfNotPresent" .pullPolicy }}
{{- end }}
{{- end -}}

{{/* Args: what it is for; name of the Secret; its keys; whether it is optional. The files belong to root. Those with a secret are for root
     and, where the pod has an `fsGroup`, for that group, to which the kubelet opens them; latentwatch refuses them when everyone may read.
     Certificates are for everyone in the containers that mount them, without their key: a patched pod may have no group of ours. */}}
{{- define "latentwatch.secretVolume" -}}
- name: latentwatch-{{ index . 0 }}
  secret:
    secretName: {{ index . 1 }}
    defaultMode: {{ ternary "0444" "0400" (has (index . 0) (list "tls" "http-tls" "forward-ca")) }}
    {{- if index . 3 }}
    optional: true
    {{- end }}
    items:
      {{- range index . 2 }}
      - key: {{ . }}
        path: {{ . }}
        {{- if eq . "tls.key" }}
        mode: 0400
        {{- end }}
      {{- end }}
{{- end -}}

{{/* Args: "watchlist" or whatever else has a volume latentwatch-NAME. */}}
{{- define "latentwatch.mount" -}}
- name: latentwatch-{{ . }}
  mountPath: /etc/latentwatch/{{ . }}
  readOnly: true
{{- end -}}

{{- define "latentwatch.tlsSecret" -}}
{{- default (printf "%s-collector-tls" (include "latentwatch.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{/* Options of `latentwatch collector`, as a list. */}}
{{- define "latentwatch.collectorArgs" -}}
- --watchlist={{ include "latentwatch.artifactPath" (list "watchlist" .Values.watchlist) }}
{{- if eq .Values.mode "sidecar" }}
- --listen=unix:///run/latentwatch/collector.sock
{{- else }}
- --listen={{ .Values.collector.bindAddress }}:{{ .Values.collector.grpcPort }}
{{- if not (or .Values.engineToken .Values.tls.enabled .Values.collector.insecure) }}
{{- fail "mode: gateway listens to the network: give engineToken or tls, or say collector.insecure: true where the network policy is enough" }}
{{- end }}
{{- end }}
{{- if or .Values.collector.insecure .Values.httpOpen }}
- --insecure
{{- end }}
- --http={{ .Values.collector.bindAddress }}:{{ .Values.collector.httpPort }}
- --state=/var/lib/latentwatch/state
{{- with .Values.baseline }}
- --baseline={{ include "latentwatch.artifactPath" (list "baseline" .) }}
{{- end }}
{{- with .Values.canaryKey }}
- --canary-key=/etc/latentwatch/canary/{{ .key }}
{{- end }}
{{- with .Values.evidence }}
{{- if .enabled }}
- --evidence=/var/lib/latentwatch/evidence
- --evidence-days={{ .days }}
- --evidence-gib={{ .gib }}
- --evidence-keep={{ .keep }}
{{- with .token }}
- --evidence-token=/etc/latentwatch/evidence-token/{{ .key }}
{{- end }}
{{- if .contentKey }}
- --evidence-key=/etc/latentwatch/evidence-key/{{ .contentKey.key }}
- --evidence-content-hours={{ .contentHours }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.otlp.url }}
- --otlp={{ . }}
{{- with $.Values.otlp.metricsSeconds }}
- --otlp-metrics={{ . }}
{{- end }}
{{- end }}
{{- with .Values.prometheusRule.runbookUrl }}
- --runbook-url={{ . }}
{{- end }}
{{- with .Values.prometheusRule.grafanaUrl }}
- --grafana-url={{ . }}
{{- end }}
{{- with .Values.forward }}
{{- if .to }}
{{- if ne $.Values.mode "sidecar" }}
{{- fail "forward.to: a gateway forwards to none; it is for mode: sidecar" }}
{{- end }}
- --forward-to={{ .to }}
{{- with .token }}
- --forward-token-file=/etc/latentwatch/forward-token/{{ .key }}
{{- end }}
{{- with .ca }}
- --forward-ca=/etc/latentwatch/forward-ca/{{ .key }}
{{- end }}
{{- end }}
{{- end }}
{{- range include "latentwatch.httpHosts" . | fromYamlArray }}
- --http-host={{ . }}
{{- end }}
{{- with include "latentwatch.httpToken" . | fromYaml }}
- --http-token-file=/etc/latentwatch/http-token/{{ .key }}
{{- end }}
{{- if .Values.httpTls.secretName }}
- --http-tls-cert=/etc/latentwatch/http-tls/tls.crt
- --http-tls-key=/etc/latentwatch/http-tls/tls.key
{{- end }}
{{- with .Values.engineToken }}
- --token-file=/etc/latentwatch/engine-token/{{ .key }}
{{- end }}
{{- if .Values.tls.enabled }}
- --tls-cert=/etc/latentwatch/tls/tls.crt
- --tls-key=/etc/latentwatch/tls/tls.key
{{- if .Values.tls.engineCertificates }}
- --tls-client-ca=/etc/latentwatch/tls/ca.crt
{{- end }}
{{- end }}
{{- range .Values.collector.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What the collector's container has in both modes, behind its name, command and probes. */}}
{{- define "latentwatch.collectorContainer" -}}
image: {{ include "latentwatch.image" (list .Values.image .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.collector.extraEnv }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.collector.resources | nindent 2 }}
securityContext:
  {{- include "latentwatch.containerSecurityContext" . | nindent 2 }}
{{- end -}}

{{/* The Secrets of which the collector reads one key: where it looks for it, and which. As YAML. */}}
{{- define "latentwatch.collectorSecrets" -}}
{{- $all := dict "canary" .Values.canaryKey "http-token" (include "latentwatch.httpToken" . | fromYaml) "engine-token" .Values.engineToken -}}
{{- if .Values.evidence.enabled -}}
{{- $all = merge $all (dict "evidence-token" .Values.evidence.token "evidence-key" .Values.evidence.contentKey) -}}
{{- end -}}
{{- if .Values.forward.to -}}
{{- $all = merge $all (dict "forward-token" .Values.forward.token "forward-ca" .Values.forward.ca) -}}
{{- end -}}
{{- range $name, $secret := $all }}
{{- if $secret }}
{{ $name }}: {{ toJson $secret }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "latentwatch.collectorMounts" -}}
{{ include "latentwatch.mount" "watchlist" }}
{{- if .Values.baseline }}
{{ include "latentwatch.mount" "baseline" }}
{{- end }}
{{- range $name, $secret := include "latentwatch.collectorSecrets" . | fromYaml }}
{{ include "latentwatch.mount" $name }}
{{- end }}
{{- if .Values.tls.enabled }}
{{ include "latentwatch.mount" "tls" }}
{{- end }}
{{- if .Values.httpTls.secretName }}
{{ include "latentwatch.mount" "http-tls" }}
{{- end }}
- name: latentwatch-data
  mountPath: /var/lib/latentwatch
- name: latentwatch-tmp
  mountPath: /tmp
{{- with .Values.collector.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "latentwatch.collectorVolumes" -}}
{{- $optional := eq .Values.mode "sidecar" -}}
{{ include "latentwatch.artifactVolume" (list "watchlist" .Values.watchlist $optional) }}
{{- with .Values.baseline }}
{{ include "latentwatch.artifactVolume" (list "baseline" . $optional) }}
{{- end }}
{{- range $name, $secret := include "latentwatch.collectorSecrets" . | fromYaml }}
{{ include "latentwatch.secretVolume" (list $name $secret.name (list $secret.key) $optional) }}
{{- end }}
{{- if .Values.tls.enabled }}
{{ include "latentwatch.secretVolume" (list "tls" (include "latentwatch.tlsSecret" .) (list "tls.crt" "tls.key" "ca.crt") $optional) }}
{{- end }}
{{- with .Values.httpTls.secretName }}
{{ include "latentwatch.secretVolume" (list "http-tls" . (list "tls.crt" "tls.key") $optional) }}
{{- end }}
- name: latentwatch-data
{{- with .Values.persistence }}
{{- if .enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-collector" (include "latentwatch.fullname" $)) .existingClaim }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
- name: latentwatch-tmp
  emptyDir: {}
{{- with .Values.collector.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
